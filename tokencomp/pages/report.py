"""The page of `tokencomp report`, from run folders alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.metrics import McNemar, Retention, mcnemar, retention
from tokencomp.evaluation.runs import IDENTITY, EvalRun, paired_scores
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES, FULL
from tokencomp.evaluation.store import MANIFEST

FIRST = (FULL, "random", "uniform", DOWNSCALE, FEWER_FRAMES)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    run: EvalRun
    accuracy: float
    retention: Retention | None = None
    against_random: McNemar | None = None
    families: dict[str, float] = field(default_factory=dict)
    flops: float = 1.0
    kv_bytes: float = 1.0
    seconds: float = float("nan")


def find_runs(paths: Sequence[Path]) -> list[EvalRun]:
    """Run folders among `paths` and directly below them.

    Raises
    ------
    OptionError
        No run, a run that is damaged or not finished, or runs of different things.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        below = [path] if (path / MANIFEST).exists() else sorted(path.glob(f"*/{MANIFEST}"))
        folders.update(dict.fromkeys(p if p.is_dir() else p.parent for p in below))
    runs = [EvalRun.read(p) for p in folders]
    if not runs:
        raise OptionError(
            f"no run folder in {', '.join(map(str, paths))}: expected folders with {MANIFEST} and "
            "records.jsonl, as `tokencomp eval -o runs` writes them."
        )
    unfinished = [str(r.path) for r in runs if not r.manifest.get("finished", True)]
    if unfinished:
        raise OptionError(
            f"not finished: {', '.join(unfinished)}. Run the same command again; it goes on where "
            "it stopped."
        )
    _check_comparable(runs)
    return sorted(runs, key=_order)


def _order(run: EvalRun) -> tuple[int, str, float]:
    name = run.identity["reducer"]
    return (FIRST.index(name) if name in FIRST else len(FIRST), run.label, run.ratio)


def _check_comparable(runs: Sequence[EvalRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        keys = {*first.identity, *run.identity} - {*IDENTITY, "method"}
        changed = sorted(k for k in keys if first.identity.get(k) != run.identity.get(k))
        if changed:
            pairs = "; ".join(
                f"{k}: {first.identity.get(k)!r} and {run.identity.get(k)!r}" for k in changed
            )
            raise OptionError(
                f"{first.path} and {run.path} cannot stand in one table: they differ in {pairs}. "
                "Make a report of each."
            )


def lines(runs: Sequence[EvalRun]) -> list[Line]:
    """The table: every run against the full model and against `random` at its ratio.

    Raises
    ------
    OptionError
        The full model's run is missing.
    """
    full = next((r for r in runs if r.identity["reducer"] == FULL), None)
    if full is None:
        raise OptionError(
            f"the run of the full model is missing, and retention needs it: give the folder that "
            f"`tokencomp eval` wrote as '{FULL}', too."
        )
    return [_line(run, full, runs) for run in runs]


def _line(run: EvalRun, full: EvalRun, runs: Sequence[EvalRun]) -> Line:
    families = {r["family"] for r in run.answered}
    values: dict[str, Any] = {
        "families": {
            f: _mean([r["correct"] for r in run.answered if r["family"] == f])
            for f in sorted(families)
        },
        "flops": run.mean("flops") / full.mean("flops"),
        "kv_bytes": run.mean("kv_bytes") / full.mean("kv_bytes"),
        "seconds": run.mean("seconds") / full.mean("seconds"),
    }
    if run is not full:
        values["retention"] = retention(*paired_scores(run, full))
        rival = next(
            (r for r in runs if r.identity["reducer"] == "random" and r.ratio == run.ratio), None
        )
        if rival is not None and rival is not run:
            values["against_random"] = mcnemar(*paired_scores(run, rival))
    return Line(run, run.mean("correct"), **values)


def _mean(values: Sequence[float]) -> float:
    return sum(map(float, values)) / len(values)


def write(table: Sequence[Line], path: Path) -> Path:
    """Write the self-contained page."""
    from tokencomp.pages.html import render

    first = table[0].run
    return render(
        "report.html",
        path,
        title=f"{first.identity['model']}: accuracy under visual-token compression",
        table=table,
        families=sorted({f for line in table for f in line.families}),
        scores=_scores(table),
        plots=_plots(table),
        pictures=_pictures(table),
        facts=first.manifest,
        identity={
            k: json.dumps(v) if isinstance(v, dict) else v
            for k, v in first.identity.items()
            if k not in (*IDENTITY, "method")
        },
        versions=_different_versions([line.run for line in table]),
        failed=_failed(table),
    )


def _scores(table: Sequence[Line]) -> list[tuple[str, list[str]]]:
    """lmms-eval's own scores, one row per task and metric, one cell per line of the table."""
    names = [
        (task, metric)
        for task, values in table[0].run.manifest.get("scores", {}).items()
        for metric in values
    ]
    return [
        (
            f"{task} · {metric}",
            [
                f"{line.run.manifest['scores'].get(task, {}).get(metric, float('nan')):.2f}"
                for line in table
            ],
        )
        for task, metric in names
    ]


def _plots(table: Sequence[Line]) -> list[Any]:
    from markupsafe import Markup

    from tokencomp.pages.plots import Point
    from tokencomp.pages.plots import lines as draw

    full = table[0]
    by_ratio: dict[str, list[Point]] = {}
    by_time: dict[str, list[Point]] = {}
    for line in table[1:]:
        kept, name = line.retention, line.run.label
        low = kept.low * full.accuracy if kept else None
        high = kept.high * full.accuracy if kept else None
        by_ratio.setdefault(name, []).append(
            Point(line.run.mean("ratio"), line.accuracy, low, high)
        )
        if line.seconds == line.seconds:
            by_time.setdefault(name, []).append(Point(line.seconds, line.accuracy))
    shared: dict[str, Any] = {"y": "accuracy", "reference": full.accuracy}
    figures = []
    if by_ratio:
        figures.append(draw(by_ratio, x="achieved ratio (visual-token work removed)", **shared))
    if by_time:
        figures.append(draw(by_time, x="time per answer against the full model", **shared))
    return [Markup(svg) for svg in figures]


def _pictures(table: Sequence[Line]) -> list[dict[str, Any]]:
    from PIL import Image

    from tokencomp.pages.pictures import KEPT, data_uri

    pictures = []
    for line in table:
        assert line.run.path is not None
        file = next(iter(sorted(line.run.path.rglob(KEPT))), None)
        if file is not None:
            with Image.open(file) as image:
                about = image.info.get("comment", b"").decode(errors="replace")
                pictures.append(
                    {"line": line, "uri": data_uri(image.convert("RGB")), "about": about}
                )
    return pictures


def _different_versions(runs: Sequence[EvalRun]) -> list[str]:
    """Packages whose versions are not the same in all runs."""
    every = [r.manifest.get("versions", {}) for r in runs]
    names = sorted({n for v in every for n in v})
    return [n for n in names if len({v.get(n) for v in every}) > 1]


def _failed(table: Sequence[Line]) -> list[tuple[str, int, str]]:
    """Reason, how many runs × items, an example id."""
    reasons: dict[str, list[str]] = {}
    for line in table:
        for record in line.run.records:
            if record.get("error"):
                reasons.setdefault(record["error"], []).append(record["id"])
    return [(reason, len(ids), ids[0]) for reason, ids in reasons.items()]


def as_json(table: Sequence[Line]) -> str:
    """The table for programs."""
    rows = [
        {
            **{k: line.run.identity[k] for k in IDENTITY},
            "items": len(line.run.answered),
            "failed": len(line.run.records) - len(line.run.answered),
            "achieved_ratio": line.run.mean("ratio"),
            "accuracy": line.accuracy,
            "retention": vars(line.retention) if line.retention else None,
            "against_random": vars(line.against_random) if line.against_random else None,
            "flops": line.flops,
            "kv_bytes": line.kv_bytes,
            "families": line.families,
        }
        for line in table
    ]
    return json.dumps(rows, indent=2)
