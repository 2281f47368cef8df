"""Run folders as rows of one table: the same questions, asked of the same model in the same way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokencomp.errors import OptionError
from tokencomp.evaluation.runs import IDENTITY, EvalRun
from tokencomp.evaluation.settings import FIRST
from tokencomp.evaluation.store import ASKED, MANIFEST

FIX = "Make a report of each, or ask the same questions again with `tokencomp eval`."


def find_runs(paths: Sequence[Path]) -> list[EvalRun]:
    """Run folders among `paths` and directly below them, in the order of tables.

    Raises `OptionError` without any, for unfinished ones, and unless all asked the same questions:
    scores are paired by their ids.
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
    for k, run in enumerate(runs):
        _check_same(runs[0], run)
        for other in runs[:k]:
            if all(run.identity[key] == other.identity[key] for key in IDENTITY):
                raise OptionError(
                    f"{other.path} and {run.path} are runs of one setting. Give one of the two, by "
                    "the folders of single runs in place of the folder that holds them."
                )
    return sorted(runs, key=_order)


def _check_same(first: EvalRun, run: EvalRun) -> None:
    """Raise `OptionError` unless `run` asked what `first` asked, in the same way."""
    both = f"{first.path} and {run.path}"
    keys = {*first.identity, *run.identity} - {*IDENTITY, "method"}
    changed = sorted(k for k in keys if first.identity.get(k) != run.identity.get(k))
    if changed:
        pairs = (f"{k}: {first.identity.get(k)!r} and {run.identity.get(k)!r}" for k in changed)
        raise OptionError(f"{both} differ in {'; '.join(pairs)}. {FIX}")
    known = {record["id"]: record for record in first.records}
    if known.keys() != {record["id"] for record in run.records}:
        raise OptionError(
            f"{both} are of different questions ({len(known)} and {len(run.records)}). {FIX}"
        )
    for record in run.answered:
        for name, words in ASKED.items():
            values = {one[name] for one in (record, known[record["id"]]) if name in one}
            if len(values) > 1:
                raise OptionError(
                    f"{both} differ in the {words} of question {record['id']!r}. {FIX}"
                )


def _order(run: EvalRun) -> tuple[int, str, list[float]]:
    """Baselines first, then by name; of a name numbers, ratios by modality, and budgets."""
    name, ratio = run.identity["reducer"], run.ratio
    if isinstance(ratio, str):  # a budget
        numbers = [2.0, *map(float, re.findall(r"\d+", ratio))]
    else:
        numbers = [1.0, *ratio.values()] if isinstance(ratio, dict) else [ratio]
    return (FIRST.index(name) if name in FIRST else len(FIRST), run.label, numbers)
