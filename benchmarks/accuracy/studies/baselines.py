"""The default against every baseline, family by family, on the largest question sets.

python -m benchmarks.accuracy.studies.baselines    # unseen/, counting/, chance/ → baselines.md

The three folders are made by `benchmarks.accuracy.run`; their pages show the commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.accuracy.report import Comparison, compare_families, table
from benchmarks.accuracy.store import ACCURACY, Results, read_all
from benchmarks.experiment import Files, write
from benchmarks.publishing import csv_text
from tokencomp.cli import one_message

FOLDERS = ("unseen", "counting", "chance")
LEVEL = 0.05

Cell = tuple[Results, str]
"""A model's results, and one of the families in them."""


def largest(every: Iterable[Results]) -> dict[tuple[str, str], Results]:
    """By model and family, the results with most questions of that family."""
    best: dict[tuple[str, str], Results] = {}
    for one in every:
        for family in one.families:
            key = one.manifest["model"], family
            if key not in best or questions((one, family)) > questions((best[key], family)):
                best[key] = one
    return dict(sorted(best.items()))


def questions(cell: Cell) -> int:
    return len(cell[0].select("both", [cell[1]]))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order of `values`."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, values[i] * (len(values) - rank)))
        adjusted[i] = highest
    return adjusted


def records(cell: Cell, comparisons: Sequence[Comparison], holm_p: Sequence[float]) -> list[Any]:
    """Rows of the CSV file: one comparison each."""
    results, family = cell
    facts = {"model": results.manifest["model"], "family": family, "questions": questions(cell)}
    return [
        {
            **facts,
            "learned": one.learned,
            "ratio": one.ratio,
            "baseline": one.base,
            "full": one.full,
            "default": one.default,
            "baseline_accuracy": one.baseline,
            "only_default_right": one.test.wins,
            "only_baseline_right": one.test.losses,
            "p": one.test.p,
            "p_holm": adjusted,
        }
        for one, adjusted in zip(comparisons, holm_p, strict=True)
    ]


def row(name: str, some: Sequence[dict[str, Any]]) -> list[str]:
    """How often the default is better, equal and worse, and how often significantly."""

    def count(sign: int, *, significant: bool = False) -> str:
        gaps = (r["default"] - r["baseline_accuracy"] for r in some)
        chosen = (r for r, gap in zip(some, gaps, strict=True) if (gap > 0) - (gap < 0) == sign)
        return str(sum(r["p_holm"] < LEVEL or not significant for r in chosen))

    worse = [r for r in some if r["default"] < r["baseline_accuracy"]]
    return [
        *(name, str(len(some)), count(1), count(1, significant=True), count(0)),
        *(count(-1), count(-1, significant=True), str(sum(r["learned"] for r in worse))),
    ]


HEAD = """# Is the default ever worse than random, uniform or smaller media?

`python -m benchmarks.accuracy.studies.baselines`

"""
BELOW = """A comparison is one question family, ratio (0.5, 0.75, 0.9, 0.95) and baseline, where
the baseline gets down to the ratio; questions are test questions of the largest set that has the
family: [learned families](unseen/README.md), [counting](counting/README.md), and families that a
model has not learned (`chance/`). On videos, answers to families of `chance/`, and at 0.95 all but
those of tiny-qwen3-vl, are of `condiv`, the default until 2026-12-02. Significant: p < 0.05 in an
exact, two-sided McNemar test after Holm's correction over all comparisons.
[Every comparison](../README.md#tables-as-csv). [Methods](METHODS.md)."""
COLUMNS = ["model", "comparisons", "better", "significantly", "equal", "worse", "significantly"]


def compared(every: Iterable[Results]) -> list[dict[str, Any]]:
    """All comparisons, with p-values that are corrected for their number."""
    cells, found = [], []
    for (_, family), results in largest(every).items():
        every_family = compare_families(results, results.default)
        cells.append((results, family))
        found.append([one for one in every_family if one.family == family])
    adjusted = iter(holm([one.test.p for some in found for one in some]))
    return [
        row
        for cell, some in zip(cells, found, strict=True)
        for row in records(cell, some, [next(adjusted) for _ in some])
    ]


def page(rows: Sequence[dict[str, Any]]) -> str:
    models = dict.fromkeys(r["model"] for r in rows)
    lines = [row(name, [r for r in rows if r["model"] == name]) for name in models]
    lines.append(row("all", rows))
    text = table([*COLUMNS, "worse on a learned family"], lines)
    return f"{HEAD}{text}\n\n{BELOW}\n"


def files() -> Files:
    """The page and its data."""
    rows = compared(one for folder in FOLDERS for one in read_all(ACCURACY / folder))
    return {ACCURACY / "baselines.md": page(rows), ACCURACY / "baselines.csv": csv_text(rows)}


if __name__ == "__main__":
    with one_message():
        write(files())
