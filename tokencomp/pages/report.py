"""The page of `tokencomp report`, from run folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from tokencomp.errors import OptionError
from tokencomp.evaluation.comparisons import Comparisons, comparisons, losses, paired_tests
from tokencomp.evaluation.fact_places import FactsKept, facts_kept, place_names
from tokencomp.evaluation.metrics import McNemar, Retention
from tokencomp.evaluation.runs import IDENTITY, EvalRun, averaged
from tokencomp.evaluation.settings import FULL
from tokencomp.pages.html import render
from tokencomp.pages.lost import can_lose, lost_ids, read_lost
from tokencomp.pages.pictures import data_uri
from tokencomp.pages.plots import Point, accuracy_point
from tokencomp.pages.plots import lines as draw


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    run: EvalRun
    accuracy: float
    retention: Retention | None = None
    against_random: McNemar | None = None
    comparisons: Comparisons = field(default_factory=Comparisons)
    families: dict[str, float] = field(default_factory=dict)
    flops: float = 1.0
    kv_bytes: float = 1.0
    seconds: float = float("nan")
    facts: FactsKept | None = None

    @property
    def deviation(self) -> str:
        """How the method's cuts differ from its paper at this depth; "" if they do not."""
        return self.run.manifest.get("deviation", "")

    @property
    def seeds(self) -> tuple[float, float] | None:
        """Accuracy of the worst and the best seed, if it is the mean of several."""
        return (min(self.run.seeds), max(self.run.seeds)) if self.run.seeds else None

    @property
    def label(self) -> str:
        """The method, with a mark if its cuts differ from those of its paper."""
        return self.run.label + ("†" if self.deviation else "")


def lines(runs: Sequence[EvalRun]) -> list[Line]:
    """The table: every run against the full model and against `random` at its ratio."""
    full = next((r for r in runs if r.identity["reducer"] == FULL), None)
    if full is None:
        raise OptionError(
            f"the run of the full model is missing, and retention needs it: give the folder that "
            f"`tokencomp eval` wrote as '{FULL}', too."
        )
    runs = averaged(runs)
    return [_line(run, full, runs) for run in runs]


def _line(run: EvalRun, full: EvalRun, runs: Sequence[EvalRun]) -> Line:
    families = {r["family"] for r in run.answered}
    values: dict[str, Any] = {
        "families": {
            f: fmean(r["correct"] for r in run.answered if r["family"] == f)
            for f in sorted(families)
        },
        **{name: _share(run, full, name) for name in ("flops", "kv_bytes", "seconds")},
        "comparisons": comparisons(run, runs),
        "facts": facts_kept(run, full),
    }
    if run is not full and (run.answered or not full.answered):
        values |= paired_tests(run, runs)
    return Line(run, run.mean("correct"), **values)


def _share(run: EvalRun, full: EvalRun, name: str) -> float:
    """A cost relative to the full model's, on items that both answered."""
    costs = {r["id"]: float(r[name]) for r in full.answered if name in r}
    own = {r["id"]: float(r[name]) for r in run.answered if name in r and r["id"] in costs}
    whole = sum(costs[k] for k in own)
    return sum(own.values()) / whole if whole else float("nan")


def write(table: Sequence[Line], path: Path) -> Path:
    """Write the self-contained page."""
    first, every = table[0].run, [line.run.manifest.get("versions", {}) for line in table]
    packages = sorted({name for versions in every for name in versions})
    return render(
        "report.html",
        path,
        title=f"{first.identity['model']}: accuracy under visual-token compression",
        table=table,
        families=sorted({f for line in table for f in line.families}),
        scores=score_rows(table),
        plots=plots(table),
        facts=first.manifest,
        identity={
            k: json.dumps(v) if isinstance(v, dict) else v
            for k, v in first.identity.items()
            if k not in (*IDENTITY, "method")
        },
        versions=[n for n in packages if len({versions.get(n) for versions in every}) > 1],
        failed=_failed(table),
        uneven=len({frozenset(line.run.scores) for line in table}) > 1,
        losses=losses([line.run for line in table]),
        compared=any(line.comparisons.random or line.comparisons.downscale for line in table),
        lost=_lost(table),
        places=places_of(table),
    )


def _lost(table: Sequence[Line]) -> list[dict[str, Any]]:
    """Per line with pictures of lost items: their number, the number of items, and the pictures."""
    shown, full = [], table[0].run
    for line in table[1:]:
        folder = line.run.path
        items = [] if folder is None else read_lost(folder)
        if folder is None or not items:
            continue
        cards = [
            {"item": item, "uri": data_uri(Image.open(folder / item.picture))} for item in items
        ]
        right = sum(map(can_lose, full.answered))
        shown.append(
            {"line": line, "count": len(lost_ids(line.run, full)), "of": right, "cards": cards}
        )
    return shown


def places_of(table: Sequence[Line]) -> dict[int, str]:
    """Columns of the table of facts: places in the answer; {} without questions with facts."""
    return place_names(table[0].facts) if table and table[0].facts else {}


def score_rows(table: Sequence[Line]) -> list[tuple[str, list[str]]]:
    """lmms-eval's own scores, one row per task and metric, one cell per line of the table."""
    scores = [line.run.manifest.get("scores", {}) for line in table]
    rows = []
    for task, known in scores[0].items():
        for metric in known:
            values = [own.get(task, {}).get(metric) for own in scores]
            cells = ["–" if v is None or v != v else f"{v:.2f}" for v in values]
            rows.append((f"{task} · {metric}", cells))
    return rows


def plots(table: Sequence[Line]) -> list[str]:
    """Accuracy by ratio, and by time per answer if it was measured, as `<svg>`."""
    full = table[0]
    by_ratio: dict[str, list[Point]] = {}
    by_time: dict[str, list[Point]] = {}
    for line in table[1:]:
        if not line.run.answered:
            continue
        name = line.run.label
        point = accuracy_point(line.run.mean("ratio"), line.accuracy, line.retention, full.accuracy)
        by_ratio.setdefault(name, []).append(point)
        if line.seconds == line.seconds:
            timed = accuracy_point(line.seconds, line.accuracy, line.retention, full.accuracy)
            by_time.setdefault(name, []).append(timed)
    shared: dict[str, Any] = {"y": "accuracy", "reference": full.accuracy}
    figures = []
    if by_ratio:
        figures.append(draw(by_ratio, x="achieved ratio (visual-token work removed)", **shared))
    if max(map(len, by_time.values()), default=0) > 1:  # else it repeats the rows of the first
        figures.append(draw(by_time, x="time per answer against the full model", **shared))
    return figures


def _failed(table: Sequence[Line]) -> list[tuple[str, int, str]]:
    """Reason, how many runs × items, an example id."""
    reasons: dict[str, list[str]] = {}
    for line in table:
        for record in line.run.records:
            if record.get("error"):
                reasons.setdefault(record["error"], []).append(record["id"])
    return [(reason, len(ids), ids[0]) for reason, ids in reasons.items()]
