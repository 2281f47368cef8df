"""Runs of one table: of one model and the same questions, one for every setting."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.runs import FIRST, IDENTITY, EvalRun
from tokencomp.evaluation.store import ASKED, MANIFEST


def find_runs(paths: Sequence[Path], ids: Collection[str] | None = None) -> list[EvalRun]:
    """Run folders among `paths` and directly below them, one run for every setting.

    With `ids`, of these items alone: earlier runs may have asked more.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        below = [path] if (path / MANIFEST).exists() else sorted(path.glob(f"*/{MANIFEST}"))
        for folder in (p if p.is_dir() else p.parent for p in below):
            folders.setdefault(folder.resolve(), folder)
    runs = [EvalRun.read(p) for p in folders.values()]
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
    if ids is not None:
        for run in runs:
            run.records = [r for r in run.records if r["id"] in ids]
    return sorted(group_runs(runs), key=_order)


def group_runs(runs: Sequence[EvalRun]) -> list[EvalRun]:
    """The runs as rows of one table; runs of one setting become one row, with the items of all.

    Items that are not in all rows are left out, and the rows say how many these were.

    Raises
    ------
    OptionError
        They differ in more than their settings, in what was asked under one id, one setting has
        two answers to a question, or no item is in all rows.
    """
    _check_identities(runs)
    _check_questions(runs)
    rows: list[EvalRun] = []
    for run in runs:
        same = next((row for row in rows if _setting(row) == _setting(run)), None)
        if same is None:
            rows.append(run)
        else:
            _join(same, run)
    _leave_common(rows)
    return rows


def _leave_common(rows: Sequence[EvalRun]) -> None:
    """Leave the items that all rows have, be they answered or failed."""
    common = set.intersection(*({record["id"] for record in row.records} for row in rows))
    if not common and any(row.records for row in rows):
        counts = ", ".join(f"{row.path} has {len(row.records)}" for row in rows)
        raise OptionError(f"no item is in all runs ({counts}). Make a report of each.")
    for row in rows:
        own = [record for record in row.records if record["id"] in common]
        row.left_out, row.records = len(row.records) - len(own), own


def _setting(run: EvalRun) -> list[Any]:
    return [run.identity[key] for key in IDENTITY]


def _join(row: EvalRun, run: EvalRun) -> None:
    """Add the items of another run of the same setting."""
    methods = [one.identity.get("method") for one in (row, run)]
    if methods[0] != methods[1]:
        raise OptionError(
            f"{row.path} and {run.path} are runs of one setting, which stood for {methods[0]!r} "
            f"and for {methods[1]!r}. Give one of the two folders."
        )
    known = {record["id"]: record for record in row.records}
    for record in run.records:
        old = known.setdefault(record["id"], record)
        if old.get("error"):
            known[record["id"]] = record
        elif not record.get("error") and _said(old) != _said(record):
            raise OptionError(
                f"{row.path} and {run.path} are runs of one setting whose answers to question "
                f"{record['id']!r} differ. Give one of the two folders."
            )
    row.records = list(known.values())


def _said(record: dict[str, Any]) -> tuple[Any, float]:
    return record.get("prediction"), float(record["correct"])


def _check_identities(runs: Sequence[EvalRun]) -> None:
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


def _check_questions(runs: Sequence[EvalRun]) -> None:
    """Refuse runs that asked different things under one id: their scores are paired by it."""
    seen: dict[tuple[str, str], tuple[EvalRun, Any]] = {}
    for run in runs:
        for record in run.answered:
            for name in (n for n in ASKED if n in record):
                other, value = seen.setdefault((record["id"], name), (run, record[name]))
                if value != record[name]:
                    raise OptionError(
                        f"{other.path} and {run.path} differ in the {ASKED[name]} of question "
                        f"{record['id']!r}, so their answers cannot be compared. Run `tokencomp "
                        "eval` again for both: questions that have changed are asked once more."
                    )


def _order(run: EvalRun) -> tuple[int, str, list[float]]:
    name, ratio = run.identity["reducer"], run.ratio
    numbers: list[float]
    if isinstance(ratio, str):  # a budget
        numbers = [2.0, *map(float, re.findall(r"\d+", ratio))]
    else:
        numbers = [1.0, *ratio.values()] if isinstance(ratio, dict) else [ratio]
    return (FIRST.index(name) if name in FIRST else len(FIRST), run.label, numbers)
