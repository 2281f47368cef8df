"""Compressed runs compared with the full model, random dropping and downscaling.

Everything is computed per item, from the answers only, on items that all compared runs answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokencomp.evaluation.metrics import Difference, difference, mcnemar, retention
from tokencomp.evaluation.runs import EvalRun, paired_scores, score_pairs
from tokencomp.evaluation.settings import DOWNSCALE, FULL, RANDOM


@dataclass(frozen=True)
class Comparisons:
    """Differences of accuracy of one run to others at its ratio, and shares; None without a value.

    `detail` is the accuracy on items that need detail (group A of VTC-Bench, arXiv 2510.07143),
    `agreement` the loyalty of EffiVLM-Bench (arXiv 2506.00479).
    """

    full: Difference | None = None
    random: Difference | None = None  # the mean of its seeds
    downscale: Difference | None = None
    seeds: int = 0
    detail: float | None = None  # accuracy on the items that downscaling gets wrong
    detail_items: int = 0
    agreement: float | None = None  # share of answers that equal the full model's, right or wrong


@dataclass(frozen=True)
class Loss:
    """A group of items on which a method scores lower than a baseline at its ratio.

    `gap` is its accuracy minus the baseline's.
    """

    label: str
    ratio: str
    family: str
    accuracy: float
    rival: str
    rival_accuracy: float
    gap: Difference

    @property
    def sure(self) -> bool:
        """Whether the 95 % interval of the difference lies below 0."""
        return self.gap.high < 0


def comparisons(run: EvalRun, runs: Sequence[EvalRun]) -> Comparisons:
    """The comparisons of `run`; `runs` holds it, the full model and any baselines."""
    full = next(r for r in runs if r.identity["reducer"] == FULL)
    if run is full:
        return Comparisons()
    random = _at(RANDOM, run.ratio, runs) if not _is(RANDOM, run) else []
    small = _at(DOWNSCALE, run.ratio, runs)
    blurred = small[0].scores if small else {}
    detail = [float(r["correct"]) for r in run.answered if blurred.get(r["id"], 1.0) < 0.5]
    return Comparisons(
        full=_against(run, [full]),
        random=_against(run, random),
        downscale=_against(run, small if not _is(DOWNSCALE, run) else []),
        seeds=sum(len(one.seeds) or 1 for one in random),
        detail=sum(detail) / len(detail) if detail else None,
        detail_items=len(detail),
        agreement=_agreement(run, full),
    )


def paired_tests(run: EvalRun, runs: Sequence[EvalRun]) -> dict[str, Any]:
    """`retention` against the full model among `runs`, and a test `against_random`, if possible."""
    full = next(r for r in runs if r.identity["reducer"] == FULL)
    values: dict[str, Any] = {"retention": retention(*paired_scores(run, full))}
    random = _at(RANDOM, run.ratio, runs)
    pairs = score_pairs(run, random) if random and not _is(RANDOM, run) else []
    if pairs:
        values["against_random"] = mcnemar(*zip(*pairs, strict=True))
    return values


def losses(runs: Sequence[EvalRun]) -> list[Loss]:
    """Groups in which a method scores lower than `random` or downscaling, the largest gap first."""
    out = []
    baselines = (RANDOM, DOWNSCALE)
    for run in runs:
        if any(_is(name, run) for name in (FULL, *baselines)):
            continue
        for name in baselines:
            group = _at(name, run.ratio, runs)
            for family in sorted({r["family"] for r in run.answered}) if group else ():
                pairs = score_pairs(run, group, family)
                own, other = zip(*pairs, strict=True) if pairs else ((), ())
                if sum(own) < sum(other):
                    mean = sum(own) / len(pairs), sum(other) / len(pairs)
                    gap = difference(own, other)
                    out.append(
                        Loss(run.label, run.shown_ratio, family, mean[0], name, mean[1], gap)
                    )
    return sorted(out, key=lambda loss: loss.gap.high)


def _at(name: str, ratio: float | dict[str, float] | str, runs: Sequence[EvalRun]) -> list[EvalRun]:
    """Runs of one baseline at a ratio: one per seed, ascending."""
    seeds: dict[int, EvalRun] = {}
    for run in runs:
        if _is(name, run) and run.ratio == ratio:
            seeds.setdefault(run.identity["options"].get("seed", 0), run)
    return [seeds[seed] for seed in sorted(seeds)]


def _is(name: str, run: EvalRun) -> bool:
    """Whether a run is this baseline: its reducer, with no option but a seed."""
    return run.identity["reducer"] == name and run.identity["options"].keys() <= {"seed"}


def _against(run: EvalRun, group: Sequence[EvalRun]) -> Difference | None:
    pairs = score_pairs(run, group) if group else []
    return difference(*zip(*pairs, strict=True)) if pairs else None


def _agreement(run: EvalRun, full: EvalRun) -> float | None:
    answers = {r["id"]: r["prediction"] for r in full.answered if r.get("prediction") is not None}
    said = [
        (text, answers[r["id"]])
        for r in run.answered
        for text in r.get("predictions", [r.get("prediction")])
        if text is not None and r["id"] in answers
    ]
    same = [text.strip() == other.strip() for text, other in said]
    return sum(same) / len(same) if same else None
