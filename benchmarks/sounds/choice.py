"""Candidates for the default on audio, by the rule of docs/decisions/0001-default-reducer.md."""

from __future__ import annotations

from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.run import RATIOS
from benchmarks.accuracy.studies.ranking import Candidate, answered, rank, title
from benchmarks.real.candidates import as_results
from tokencomp.evaluation.settings import DOWNSCALE, FULL, RANDOM, REST
from tokencomp.reducers.registry import make_reducer

NO_CANDIDATES = (FULL, RANDOM, DOWNSCALE, "auto")
HEAD = """
## Candidates for the default

Retention on the validation questions, by the
[rule for images and videos](../../docs/decisions/0001-default-reducer.md): of the candidates that
are tied with the best, the one with most to spare above the bars wins.
"""


def choice_lines(results: dict[str, Any]) -> list[str]:
    """The section of the page; empty where a candidate lacks a ratio."""
    asked = as_results(results["validation"], results["identity"]["weights"], results["about"])
    every = [candidate(row) for row in results["validation"]["rows"]]
    unique = [c for i, c in enumerate(every) if c not in every[:i] and c[0] not in NO_CANDIDATES]
    if not all(answered([asked], one) for one in unique):
        return []
    rows, keeping = rank([asked], unique), [one for one in unique if not merges(one)]
    head = ["candidate", "score", "difference to best (95 %)", "to spare"]
    return [
        HEAD,
        publishing.table([*head, *(f"ratio {r:g}" for r in RATIOS)], [cells(r) for r in rows]),
        f"\nBy the rule: **{chosen(rows)}**. Of the candidates that keep tokens as they are: "
        f"**{chosen(rank([asked], keeping))}**.",
    ]


def candidate(row: dict[str, Any]) -> Candidate:
    return row["reducer"], row["options"]


def merges(one: Candidate) -> bool:
    name, options = one
    return options.get(REST) == "merge" or make_reducer(name).merges


def chosen(rows: list[dict[str, Any]]) -> str:
    """What the rule names."""
    best = max((row for row in rows if row["tied"]), key=lambda row: row["spare"])
    return title(candidate(best))


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["difference"]
    return [
        title(candidate(row)),
        f"{row['score']:.1%}",
        f"[{low:+.1%}, {high:+.1%}]" + (" tied" if row["tied"] else ""),
        f"{100 * row['spare']:+.2f}",
        *(f"{value:.1%}" for value in row["cells"]),
    ]
