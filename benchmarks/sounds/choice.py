"""Candidates for the default on audio, by the rule of docs/decisions/0001-default-reducer.md."""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.studies.ranking import Candidate, answered, choice_table, rank, title
from benchmarks.real.candidates import as_results
from tokencomp.evaluation.settings import DOWNSCALE, FULL, MERGE, RANDOM
from tokencomp.reducers.registry import make_reducer

NO_CANDIDATES = (FULL, RANDOM, DOWNSCALE, "auto")
HEAD = """
## Candidates for the default

Retention on the validation questions, by the
[rule for images and videos](../../docs/decisions/0001-default-reducer.md): of the candidates that
are tied with the best, the one with most points to spare above the bars wins.
"""


def choice_lines(results: dict[str, Any]) -> list[str]:
    """The section of the page; empty where a candidate lacks a ratio."""
    weights, run = results["identity"]["weights"], results["environment"]
    asked = as_results(results["validation"], weights, run)
    every = [candidate(row) for row in results["validation"]["rows"]]
    unique = [c for i, c in enumerate(every) if c not in every[:i] and c[0] not in NO_CANDIDATES]
    if not all(answered([asked], one) for one in unique):
        return []
    rows, keeping = rank([asked], unique), [one for one in unique if not merges(one)]
    best = chosen(rank([asked], keeping))
    return [
        HEAD,
        choice_table(rows, best, [asked]),
        f"\nBy the rule: **{title(chosen(rows))}**. Of the candidates that keep tokens "
        f"unchanged: **{title(best)}**.",
    ]


def candidate(row: dict[str, Any]) -> Candidate:
    return row["reducer"], row["options"]


def merges(one: Candidate) -> bool:
    name, options = one
    return options.get(MERGE) is True or make_reducer(name).traits.merges


def chosen(rows: list[dict[str, Any]]) -> Candidate:
    """What the rule names."""
    return candidate(max((row for row in rows if row["tied"]), key=lambda row: row["spare"]))
