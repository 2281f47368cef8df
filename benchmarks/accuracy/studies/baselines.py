"""The default against every baseline, family by family, on the largest question sets.

python -m benchmarks.accuracy.studies.baselines    # from unseen/, counting/, chance/ → baselines.md

The three folders are made by `benchmarks.accuracy.run`; their pages show the commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.accuracy.store import ACCURACY, Results, read_all
from benchmarks.accuracy.tables import Comparison, compare_families, table
from tokencomp.cli import one_message
from tokencomp.storage import write_text

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


def row(cell: Cell, comparisons: Sequence[Comparison]) -> list[str]:
    results, family = cell
    worst = min(comparisons, key=lambda one: one.default - one.baseline)
    gap = 100 * (worst.default - worst.baseline)
    return [
        results.manifest["model"],
        family,
        "yes" if family in results.learned else "no",
        str(questions(cell)),
        f"{worst.full:.1%}",
        str(len(comparisons)),
        str(sum(one.default > one.baseline for one in comparisons)),
        str(sum(one.lost for one in comparisons)),
        f"{gap:+.1f} ({worst.base}, {worst.ratio:g}; p = {worst.test.p:.2g})",
    ]


def verdict(every: Sequence[Comparison]) -> str:
    """How often the default is better, equal, worse, and how many of these are significant."""
    adjusted = holm([one.test.p for one in every])
    significant = [one for one, p in zip(every, adjusted, strict=True) if p < LEVEL]
    losses = [one for one in every if one.lost]
    won = sum(one.default > one.baseline for one in every)
    text = (
        f"In {len(every)} comparisons the default is better in {won} "
        f"({sum(not one.lost for one in significant)} significant), equal in "
        f"{len(every) - won - len(losses)}, and worse in {len(losses)} "
        f"({sum(one.lost for one in significant)} significant"
    )
    if losses:
        learned, p = sum(one.learned for one in losses), min(one.test.p for one in losses)
        text += f", {learned} on families that the model has learned"
        text += f"; smallest p before the correction {p:.2g}"
    return f"{text})."


HEAD = """# The default against random, uniform and downscale, family by family

Made by `python -m benchmarks.accuracy.studies.baselines`. Every embedded model and question family,
at ratios 0.5, 0.75, 0.9 and 0.95, on the test split, from the largest question sets: [learned
families](unseen/README.md), [counting](counting/README.md), [families not
learned](chance/README.md). Nothing was chosen on the first set. The counting set led to a second
look at [condiv's margin](../../docs/decisions/0002-condiv-margin.md).

A comparison is one family, ratio and baseline, where the baseline gets down to the ratio. Tests are
exact, two-sided McNemar tests; significant means p < 0.05 after Holm's correction for all
comparisons on this page. "Worst" is the comparison in which the default has the smallest lead, in
points of accuracy. Two methods that both lose nothing against the full model differ by single
questions in either direction. On families at chance there is nothing to lose, and which of two
methods is better is a coin toss. [Methods](METHODS.md).

"""
COLUMNS = ["model", "family", "learned", "questions", "full", "comparisons", "better", "worse"]


def page(every: Iterable[Results]) -> str:
    rows, compared = [], []
    for (_, family), results in largest(every).items():
        every_family = compare_families(results, results.default)
        comparisons = [one for one in every_family if one.family == family]
        compared += comparisons
        rows.append(row((results, family), comparisons))
    return f"{HEAD}{verdict(compared)}\n\n{table([*COLUMNS, 'worst'], rows)}\n"


def read() -> list[Results]:
    return [one for folder in FOLDERS for one in read_all(ACCURACY / folder)]


def main() -> None:
    text = page(read())
    write_text(ACCURACY / "baselines.md", text)
    print(ACCURACY / "baselines.md")


if __name__ == "__main__":
    with one_message():
        main()
