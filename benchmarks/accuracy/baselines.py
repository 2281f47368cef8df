"""The default against every baseline, family by family, on the most questions there are.

python benchmarks/accuracy/baselines.py    # from unseen/, counting/ and chance/ → baselines.md

The three folders are made by run.py; their pages say how.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from report import read_all
from results import Results
from tables import Comparison, compare_families, table

from tokencomp.cli import one_message
from tokencomp.patching import DEFAULT_REDUCER
from tokencomp.trained.cards import replace_file

HERE = Path(__file__).parent
FOLDERS = ("unseen", "counting", "chance")
LEVEL = 0.05

Cell = tuple[Results, str]  # a model's answers, and one of the families in them


def largest(every: Iterable[Results]) -> dict[tuple[str, str], Results]:
    """By model and family, the results with most questions of that family."""
    found: dict[tuple[str, str], Results] = {}
    for one in every:
        for family in one.families:
            key = one.manifest["model"], family
            if key not in found or questions((one, family)) > questions((found[key], family)):
                found[key] = one
    return dict(sorted(found.items()))


def questions(cell: Cell) -> int:
    return len(cell[0].of("both", [cell[1]]))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, values[i] * (len(values) - rank)))
        adjusted[i] = highest
    return adjusted


def row(cell: Cell, mine: Sequence[Comparison]) -> list[str]:
    results, family = cell
    worst = min(mine, key=lambda one: one.default - one.baseline)
    gap = 100 * (worst.default - worst.baseline)
    return [
        results.manifest["model"],
        family,
        "yes" if family in results.learned else "no",
        str(questions(cell)),
        f"{worst.full:.1%}",
        str(len(mine)),
        str(sum(one.default > one.baseline for one in mine)),
        str(sum(one.lost for one in mine)),
        f"{gap:+.1f} ({worst.base}, {worst.ratio:g}; p = {worst.test.p:.2g})",
    ]


def verdict(every: Sequence[Comparison]) -> str:
    """How often the default is ahead, equal, behind, and what of it is more than chance."""
    adjusted = holm([one.test.p for one in every])
    sure = [one for one, p in zip(every, adjusted, strict=True) if p < LEVEL]
    lost = [one for one in every if one.lost]
    won = sum(one.default > one.baseline for one in every)
    told = (
        f"In {len(every)} comparisons the default got more right in {won} "
        f"({sum(not one.lost for one in sure)} of them significant), as many in "
        f"{len(every) - won - len(lost)}, fewer in {len(lost)} "
        f"({sum(one.lost for one in sure)} significant"
    )
    if lost:
        learned, p = sum(one.learned for one in lost), min(one.test.p for one in lost)
        told += f", {learned} on families that the model has learned"
        told += f"; smallest p before the correction {p:.2g}"
    return f"{told})."


HEAD = """# The default against random, uniform and downscale, family by family

Every packaged model and question family, at ratios 0.5, 0.75, 0.9 and 0.95, on the test split, with
the most questions that were asked: [learned families](unseen/README.md),
[counting](counting/README.md), [families not learned](chance/README.md). Those of the first had no
part in any choice; those about counting led to a second look at [condiv's margin](margin.md). A
comparison is one family, ratio and baseline, where the baseline gets down to the ratio. Exact
McNemar tests, two-sided; significant: p < 0.05 after Holm's correction for all comparisons of this
page. Worst: the comparison in which the default is least ahead, in points of accuracy. Two methods
that lose nothing against the full model differ by single questions in either direction, and on
families at chance there is nothing to lose: which of the two is ahead there is a coin toss.

"""
COLUMNS = ["model", "family", "learned", "questions", "full", "comparisons", "ahead", "behind"]


def page(every: Iterable[Results], default: str = DEFAULT_REDUCER) -> str:
    rows, compared = [], []
    for (_, family), results in largest(every).items():
        mine = [one for one in compare_families(results, default) if one.family == family]
        compared += mine
        rows.append(row((results, family), mine))
    return f"{HEAD}{verdict(compared)}\n\n{table([*COLUMNS, 'worst'], rows)}\n"


def read() -> list[Results]:
    return [one for folder in FOLDERS for one in read_all(HERE / folder)]


def main() -> None:
    text = page(read())
    replace_file(HERE / "baselines.md", lambda part: part.write_text(text))
    print(HERE / "baselines.md")


if __name__ == "__main__":
    with one_message():
        main()
