"""The page of `tokencomp report`, from run folders alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.metrics import McNemar, Retention, mcnemar, retention
from tokencomp.evaluation.runner import KEPT
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES, FULL
from tokencomp.evaluation.store import MANIFEST, read_json, read_records

SETTING = ("reducer", "ratio", "options")
FIRST = (FULL, "random", "uniform", DOWNSCALE, FEWER_FRAMES)


@dataclass(frozen=True)
class Stored:
    """One run folder."""

    path: Path
    manifest: dict[str, Any]
    records: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Stored:
        """A run folder. Raises `OptionError` if it is damaged or holds fewer items than it says."""
        run = cls(path, read_json(path / MANIFEST), read_records(path))
        identity, summary = run.manifest.get("identity"), run.manifest.get("summary", {})
        if not isinstance(identity, dict) or not {*SETTING} <= identity.keys():
            raise OptionError(
                f"{path / MANIFEST} does not say of which {', '.join(SETTING)} the run is. Give "
                "folders that `tokencomp eval` wrote."
            )
        said = summary.get("items", 0) + summary.get("failed", 0)
        if len(run.records) < said:
            raise OptionError(
                f"{path} has records of {len(run.records)} items, and its manifest says {said}. "
                "Copy all of its files, or remove the folder and run the command again."
            )
        broken = [r["id"] for r in run.answered if not {"family", "correct"} <= r.keys()]
        if broken:
            raise OptionError(f"{path}: the record of {broken[0]!r} lacks family or correct.")
        return run

    @property
    def identity(self) -> dict[str, Any]:
        return self.manifest["identity"]

    @property
    def label(self) -> str:
        options = [f"{k}={v}" for k, v in sorted(self.identity["options"].items())]
        return " ".join([self.identity["reducer"], *options])

    @property
    def ratio(self) -> float:
        return float(self.identity["ratio"])

    @property
    def answered(self) -> list[dict[str, Any]]:
        return [r for r in self.records if not r.get("error")]

    def mean(self, name: str) -> float:
        values = [float(r[name]) for r in self.answered if name in r]
        return sum(values) / len(values) if values else float("nan")


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    run: Stored
    accuracy: float
    retention: Retention | None = None
    against_random: McNemar | None = None
    families: dict[str, float] = field(default_factory=dict)
    flops: float = 1.0
    kv_bytes: float = 1.0
    seconds: float = float("nan")


def find_runs(paths: Sequence[Path]) -> list[Stored]:
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
    runs = [Stored.read(p) for p in folders]
    if not runs:
        given = ", ".join(map(str, paths))
        raise OptionError(
            f"no run folder in {given}: expected folders with {MANIFEST} and records.jsonl, as "
            "`tokencomp eval -o runs` writes them."
        )
    unfinished = [str(r.path) for r in runs if not r.manifest.get("finished", True)]
    if unfinished:
        raise OptionError(
            f"not finished: {', '.join(unfinished)}. Run the same command again; it goes on where "
            "it stopped."
        )
    _same_thing(runs)
    return sorted(runs, key=_order)


def _order(run: Stored) -> tuple[int, str, float]:
    name = run.identity["reducer"]
    return (FIRST.index(name) if name in FIRST else len(FIRST), run.label, run.ratio)


def _same_thing(runs: Sequence[Stored]) -> None:
    first = runs[0]
    for run in runs[1:]:
        keys = {*first.identity, *run.identity} - {*SETTING, "method"}
        changed = sorted(k for k in keys if first.identity.get(k) != run.identity.get(k))
        if changed:
            told = "; ".join(
                f"{k}: {first.identity.get(k)!r} and {run.identity.get(k)!r}" for k in changed
            )
            raise OptionError(
                f"{first.path} and {run.path} cannot stand in one table: they differ in {told}. "
                "Make a report of each."
            )


def lines(runs: Sequence[Stored]) -> list[Line]:
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


def _line(run: Stored, full: Stored, runs: Sequence[Stored]) -> Line:
    families = {r["family"] for r in run.answered}
    found: dict[str, Any] = {
        "families": {
            f: _mean([r["correct"] for r in run.answered if r["family"] == f])
            for f in sorted(families)
        },
        "flops": run.mean("flops") / full.mean("flops"),
        "kv_bytes": run.mean("kv_bytes") / full.mean("kv_bytes"),
        "seconds": run.mean("seconds") / full.mean("seconds"),
    }
    if run is not full:
        found["retention"] = retention(*paired(run, full))
        rival = next(
            (r for r in runs if r.identity["reducer"] == "random" and r.ratio == run.ratio), None
        )
        if rival is not None and rival is not run:
            found["against_random"] = mcnemar(*paired(run, rival))
    return Line(run, run.mean("correct"), **found)


def _mean(values: Sequence[float]) -> float:
    return sum(map(float, values)) / len(values)


def paired(run: Stored, other: Stored) -> tuple[list[float], list[float]]:
    """Scores of the items that both answered, in one order.

    Raises
    ------
    OptionError
        They have no item in common.
    """
    theirs = {r["id"]: float(r["correct"]) for r in other.answered}
    pairs = [(float(r["correct"]), theirs[r["id"]]) for r in run.answered if r["id"] in theirs]
    if not pairs:
        raise OptionError(f"{run.path} and {other.path} have no answered item in common.")
    return [a for a, _ in pairs], [b for _, b in pairs]


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
            if k not in (*SETTING, "method")
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

    from tokencomp.pages.pictures import data_uri

    found = []
    for line in table:
        file = next(iter(sorted(line.run.path.rglob(KEPT))), None)
        if file is not None:
            with Image.open(file) as image:
                about = image.info.get("comment", b"").decode(errors="replace")
                found.append({"line": line, "uri": data_uri(image.convert("RGB")), "about": about})
    return found


def _different_versions(runs: Sequence[Stored]) -> list[str]:
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
            **{k: line.run.identity[k] for k in SETTING},
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
