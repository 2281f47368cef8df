"""Facts of long answers: which are kept, by their place in the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokencomp.evaluation.runs import EvalRun

PLACES = ((1, 1), (2, 2), (3, 4), (5, 6), (7, 9), (10, math.inf))
"""First and last place of a fact in its answer."""


@dataclass(frozen=True)
class FactsKept:
    """Facts of a run, on the questions with facts that it and the full model have answered.

    `by_place` has for each of `PLACES` the facts that are right, divided by those of the full
    model; of the full model itself, divided by all facts. NaN where the divisor is 0.
    """

    by_place: tuple[float, ...]
    left_out: float  # share of all facts that the answers do not have
    invented: float  # statements without any fact, per answer
    facts: tuple[int, ...]  # number of facts at each of `PLACES`


def facts_kept(run: EvalRun, full: EvalRun) -> FactsKept | None:
    """Facts that a run keeps of what the full model has; None without questions with facts."""
    whole = {r["id"]: r["facts"] for r in full.answered if "facts" in r}
    asked = [r for r in run.answered if "facts" in r and r["id"] in whole]
    if not asked:
        return None
    kept = _by_place([r["facts"] for r in asked])
    right = _by_place([whole[r["id"]] for r in asked])
    facts = _by_place([[1] * len(r["facts"]) for r in asked])
    divisor = facts if run is full else right
    share = [a / b if b else math.nan for a, b in zip(kept, divisor, strict=True)]
    return FactsKept(
        tuple(share),
        1 - sum(kept) / sum(facts),
        sum(float(r["invented"]) for r in asked) / len(asked),
        tuple(map(int, facts)),
    )


def _by_place(answers: Sequence[Sequence[float]]) -> list[float]:
    """Sums of the values at each of `PLACES` over all answers."""
    return [
        sum(v for one in answers for at, v in enumerate(one, 1) if first <= at <= last)
        for first, last in PLACES
    ]


def place_names(facts: FactsKept) -> dict[int, str]:
    """Columns of a table: numbers of the `PLACES` that have facts, with their names."""
    words = {
        k: f"{a}" if a == b else f"{a}+" if b == math.inf else f"{a}–{b}"
        for k, (a, b) in enumerate(PLACES)
    }
    return {k: name for k, name in words.items() if facts.facts[k]}
