"""What the accuracy benchmark says about one setting, and the rows of its pages and CSV files."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.store import KINDS, Results, kind_of
from tokencomp.errors import TokenCompError
from tokencomp.evaluation.metrics import McNemar, Retention, difference, mcnemar, retention
from tokencomp.evaluation.settings import DOWNSCALE, FULL, RANDOM, Setting
from tokencomp.zoo import available_models, metrics, model_path

BASELINES = (RANDOM, "uniform", DOWNSCALE)
SLACK = 0.05  # of the ratio, for a baseline that cannot reach it exactly
NONE = "–"
EARLIER = ("Tango()", "HiPrune()")
"""Stored methods whose reducer follows another rule today, see METHODS.md."""

table = functools.partial(publishing.table, rule=" --- ")


def kept(results: Results, label: str, kind: str) -> Retention | None:
    """Retention over the learned families of "images", "videos" or "both", or over "all" questions.

    None without such questions, or for a baseline that does not get down to the ratio there.
    """
    families = None if kind == "all" else results.learned
    scores = results.scores(label, kind, families)
    if not scores or not reaches(results, label, kind):
        return None
    return retention(scores, results.scores(FULL, kind, families))


def reaches(results: Results, label: str, kind: str) -> bool:
    """Whether a baseline drops as many tokens as its ratio says, within `SLACK`."""
    setting = results.settings[label]
    is_baseline = setting["reducer"] in BASELINES
    return not is_baseline or results.reached(label, kind) >= setting["ratio"] - SLACK


def earlier(setting: dict[str, Any]) -> str:
    """A mark of answers by a reducer that has another rule today."""
    return " (earlier rule)" if setting.get("method") in EARLIER else ""


def record(results: Results, label: str) -> dict[str, Any]:
    """One row of the CSV file of a model. Shares are of the full model's amounts.

    `kept_*` is retention with its paired 95 % interval, `vs_*` a difference of accuracy on the
    learned families, `p_*` an exact McNemar test on them; METHODS.md explains the columns.
    """
    setting, full = results.settings[label], results.settings[FULL]
    run = results.manifest["runs"][setting["run"]]
    row: dict[str, Any] = {
        "reducer": setting["reducer"] + earlier(setting),
        "options": setting["options"],
        "ratio": setting["ratio"],
        "seeds": len(results.seeds.get(label, (1,))),
        "commit": str(run["commit"])[:12] + ("+dirty" if "+" in str(run["commit"]) else ""),
        "date": run["date"][:10],
        "achieved_ratio": setting["achieved_ratio"],
        "flops": setting["flops"] / full["flops"],
        "departs_from_paper": deviation(results, setting),
    }
    for kind in (*KINDS, "both", "all"):
        share = kept(results, label, kind) if label != FULL else None
        row |= _interval(f"kept_{kind}", share)
    row |= _against(results, label)
    row |= {f"family_{f}": _accuracy(results, label, f) for f in results.families}
    return row | _work(setting.get("work", {}), full.get("work", {}))


def _interval(name: str, value: Any) -> dict[str, float | None]:
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {name + end: None if value is None else getattr(value, p) for end, p in parts.items()}


def _accuracy(results: Results, label: str, family: str) -> float | None:
    comparable = reaches(results, label, kind_of(family))
    return results.accuracy(label, family) if comparable else None


def _against(results: Results, label: str) -> dict[str, Any]:
    """Accuracy on the learned families, and how it compares with other settings there."""
    scores, ratio = results.scores(label, "both", results.learned), results.settings[label]["ratio"]
    row: dict[str, Any] = {"accuracy": sum(scores) / len(scores) if scores else None}
    default = results.default
    others = {"full": FULL, RANDOM: f"{RANDOM}-{ratio:g}", DOWNSCALE: f"{DOWNSCALE}-{ratio:g}"}
    others["default"] = f"{default}-{ratio:g}"
    usable = {
        name: other
        for name, other in others.items()
        if scores and other != label and other in results.settings
        if all(reaches(results, one, "both") for one in (label, other))
    }
    for name in others:
        gap = None
        if name in usable:
            gap = difference(scores, results.scores(usable[name], "both", results.learned))
        row |= _interval(f"vs_{name}", gap)
    for name in (RANDOM, "default"):
        test = compared(results, label, usable[name], "both") if name in usable else None
        row[f"p_{name}"] = test and test.p
    if DOWNSCALE in usable:
        blurred = results.scores(usable[DOWNSCALE], "both", results.learned)
        detail = [right for right, other in zip(scores, blurred, strict=True) if not other]
        row["where_downscale_fails"] = sum(detail) / len(detail) if detail else None
    agrees = results.answers.agrees[label]
    same = [agrees[i] for i in results.select("both", results.learned)]
    return row | {"same_answer": sum(same) / len(same) if same else None}


def _work(work: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """FLOPs and bytes of one answer by part, as shares; of the reducer as a share of the prefill.

    The full model's row has the amounts.
    """
    row = {}
    for kind, parts in work.items():
        for part, value in parts.items():
            base = full[kind]["prefill" if part == "reduce" else part]
            known = value if work is full else value / base if value is not None and base else None
            row[f"{part}_{kind}"] = known
    return row


def deviation(results: Results, setting: dict[str, Any]) -> str:
    """How the method departs from its paper on this model; "" where it does not.

    Of a method with options that only an earlier release had, that it has.
    """
    model = results.manifest["model"]
    if model not in available_models():
        return ""
    layers = metrics(model)["model"]["layers"]
    decoded = max((run.get("frames", 0) for run in results.manifest["runs"]), default=0)
    known = steps(model, decoded) if "videos" in results.kinds else 0
    try:
        return Setting(setting["reducer"], setting["ratio"], setting["options"]).deviation(
            layers, known
        )
    except TokenCompError:
        return "has options of release 0.1"


@functools.cache
def steps(model: str, frames: int) -> int:
    """Steps in time of a video in an embedded model; towers of Qwen read frames in pairs."""
    vision = json.loads((model_path(model) / "config.json").read_text()).get("vision_config", {})
    return -(-frames // vision.get("temporal_patch_size", 1))


def compared(results: Results, label: str, base: str, kind: str) -> McNemar:
    """McNemar over the learned families of one kind."""
    pair = [results.scores(one, kind, results.learned) for one in (label, base)]
    return mcnemar(*pair)


@dataclass(frozen=True)
class Comparison:
    """The default and a baseline at the same ratio, on one family.

    Attributes
    ----------
    family, learned
        The question family, and whether the model has learned it.
    ratio, base
        The ratio, and the name of the baseline.
    default, baseline, full
        Accuracy of the default, of the baseline, and of the uncompressed model.
    test
        Paired test; a win is a question that only the default answers correctly.
    """

    family: str
    learned: bool
    ratio: float
    base: str
    default: float
    baseline: float
    full: float
    test: McNemar

    @property
    def lost(self) -> bool:
        return self.default < self.baseline


def rivals(results: Results, default: str) -> Iterator[tuple[float, str, str, str]]:
    """Ratio, baseline's name, label of the default, label of the baseline, where both ran."""
    for ratio, base in itertools.product(results.ratios, BASELINES):
        labels = f"{default}-{ratio:g}", f"{base}-{ratio:g}"
        if {*labels} <= results.settings.keys():
            yield ratio, base, *labels


def compare_families(results: Results, default: str) -> list[Comparison]:
    """One comparison per family, ratio and baseline."""
    comparisons = []
    for (ratio, base, *labels), family in itertools.product(
        rivals(results, default), results.families
    ):
        if reaches(results, labels[1], kind_of(family)):
            test = mcnemar(*(results.scores(k, families=[family]) for k in labels))
            accuracies = (results.accuracy(k, family) for k in (*labels, FULL))
            learned = family in results.learned
            comparisons.append(Comparison(family, learned, ratio, base, *accuracies, test))
    return comparisons
