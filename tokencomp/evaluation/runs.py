"""The results of one setting, in memory or read back from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import PLAN, RANDOM, Setting
from tokencomp.evaluation.store import MANIFEST, read_records
from tokencomp.plan.counts import ratio_text
from tokencomp.storage import read_object

IDENTITY = ("reducer", "ratio", "options")
"""Keys of a manifest's identity that say which setting a run is of."""


@dataclass
class EvalRun:
    """Results of one setting.

    Attributes
    ----------
    setting
        None for a run that was read from a folder, whose manifest describes it.
    records
        One dict per example: id, family, prediction, answer, correct, cost fields, or error.
    seeds
        Accuracy of every seed, of a run that is the mean of several; see `averaged`.
    """

    setting: Setting | None
    records: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    seeds: tuple[float, ...] = ()

    @classmethod
    def read(cls, path: Path) -> EvalRun:
        """Read a run folder; raises `OptionError` if it is damaged, or lacks items."""
        run = cls(None, read_records(path), read_object(path / MANIFEST), path)
        summary = run.manifest.get("summary", {})
        expected = summary.get("items", 0) + summary.get("failed", 0)
        if len(run.records) < expected:
            raise OptionError(
                f"{path} has records of {len(run.records)} items, and its manifest says "
                f"{expected}. Copy all of its files, or remove the folder and run the command "
                "again."
            )
        return run

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on: model, setting, and how the questions were put."""
        return self.manifest["identity"]

    @property
    def label(self) -> str:
        """The reducer with its options, e.g. "prune schedule=fastv"; "plan" for explicit stages."""
        options = [f"{k}={v}" for k, v in sorted(self.identity["options"].items()) if k != PLAN]
        if self.seeds:
            options.append(f"({len(self.seeds)} seeds)")
        return " ".join([self.identity["reducer"], *options])

    @property
    def ratio(self) -> float | dict[str, float] | str:
        """As requested: a number, numbers by modality, or a budget in words."""
        return self.identity["ratio"]

    @property
    def shown_ratio(self) -> str:
        """The requested ratio as the command line takes it."""
        return ratio_text(self.ratio)

    @property
    def answered(self) -> list[dict[str, Any]]:
        return [r for r in self.records if not r.get("error")]

    @property
    def scores(self) -> dict[str, float]:
        """Score of every answered item, by its id."""
        return {r["id"]: float(r["correct"]) for r in self.answered}

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r.get("error")]

    def mean(self, name: str) -> float:
        """Mean of a field over the answered items that have it; NaN without any."""
        values = [float(r[name]) for r in self.answered if name in r]
        return sum(values) / len(values) if values else float("nan")

    @property
    def mean_tokens(self) -> float:
        """Visual tokens that a layer sees, averaged over layers, then over the answered items."""
        layers = [r["per_layer"] for r in self.answered if "per_layer" in r]
        means = [sum(seen) / len(seen) for seen in layers]
        return sum(means) / len(means) if means else float("nan")

    def summary(self) -> dict[str, Any]:
        """Counts and means, ready for JSON."""
        fields = {"accuracy": "correct", "achieved_ratio": "ratio", "flops": "flops"}
        means = {k: self.mean(v) for k, v in {**fields, "kv_bytes": "kv_bytes"}.items()}
        return {"items": len(self.answered), "failed": len(self.failed), **means}


def averaged(runs: Sequence[EvalRun]) -> list[EvalRun]:
    """Replace all seeds of `random` at a ratio by one run: their mean per item."""
    out: list[EvalRun] = []
    groups: dict[Any, list[EvalRun]] = {}
    for run in runs:
        identity = run.identity
        if identity["reducer"] == RANDOM and identity["options"].keys() <= {"seed"}:
            groups.setdefault(run.shown_ratio, []).append(run)
            if len(groups[run.shown_ratio]) > 1:
                continue
        out.append(run)
    means = {id(group[0]): _mean_run(group) for group in groups.values() if len(group) > 1}
    return [means.get(id(run), run) for run in out]


def _mean_run(seeds: Sequence[EvalRun]) -> EvalRun:
    """The mean run of several seeds; an item that failed with one of them failed."""
    every = [{r["id"]: r for r in run.records} for run in seeds]
    records = []
    for name, first in every[0].items():
        rows = [by_id[name] for by_id in every if name in by_id]
        failed = [r for r in rows if r.get("error")]
        same: dict[str, Any] = {
            k: sum(float(r[k]) for r in rows) / len(rows)
            for k in ("correct", "invented", "ratio", "flops", "kv_bytes", "seconds")
            if all(k in r for r in rows)
        }
        if all("facts" in r for r in rows):
            each = zip(*(r["facts"] for r in rows), strict=True)
            same["facts"] = [sum(values) / len(values) for values in each]
        answers = [r["prediction"] for r in rows if r.get("prediction") is not None]
        records.append(failed[0] if failed else {**first, **same, "predictions": answers})
    identity = {**seeds[0].identity, "options": {}}
    accuracies = tuple(run.mean("correct") for run in seeds)
    manifest = {**seeds[0].manifest, "identity": identity}
    return replace(seeds[0], records=records, manifest=manifest, seeds=accuracies)


def paired_scores(run: EvalRun, other: EvalRun) -> tuple[list[float], list[float]]:
    """Scores of the items that both runs answered, in the same order."""
    pairs = score_pairs(run, [other])
    if not pairs:
        places = [str(r.path or r.identity["reducer"]) for r in (run, other)]
        failed = [*run.failed, *other.failed][:1]
        reason = "".join(f" {r['id']!r} failed: {r['error']}" for r in failed)
        raise OptionError(f"{places[0]} and {places[1]} have no answered item in common.{reason}")
    return [a for a, _ in pairs], [b for _, b in pairs]


def score_pairs(
    run: EvalRun, others: Sequence[EvalRun], family: str | None = None
) -> list[tuple[float, float]]:
    """Score of the run and mean of the others, per item (of `family`) that all of them answered."""
    scores = [other.scores for other in others]
    return [
        (float(r["correct"]), sum(s[r["id"]] for s in scores) / len(scores))
        for r in run.answered
        if (family is None or r["family"] == family) and all(r["id"] in s for s in scores)
    ]
