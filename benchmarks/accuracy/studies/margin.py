"""condiv's margin on ten times as many image questions as choose.py has.

python -m benchmarks.accuracy.studies.margin            # runs what is missing → margin.md
python -m benchmarks.accuracy.studies.margin --report   # from the stored results

The rule, its history and the reasons are in docs/decisions/0002-condiv-margin.md.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.report import table
from benchmarks.accuracy.run import RATIOS
from benchmarks.accuracy.store import ACCURACY, RESULTS, Results, read_all
from benchmarks.accuracy.studies.choose import VIDEOS, preference, run_missing
from benchmarks.accuracy.studies.ranking import Candidate, answered, rank, settings
from benchmarks.experiment import Files, write
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import FULL

FOLDER = ACCURACY / "margin"
MARGINS = (0.0, 0.05, 0.1, 0.2)
FAMILIES = ("attribute", "existence", "count", "small_object")

INTRO = """Four margins of condiv (power 1) on 400 validation questions of every image family.
Columns and rule are those of the [choice of the default](choice.md); counting is in the CSV file
for every model, though two of them have not learned it. [What led to the
study](../../docs/decisions/0002-condiv-margin.md). [Accuracy by model, family and
ratio](../README.md#tables-as-csv)."""


def candidate(margin: float) -> Candidate:
    return "condiv", {"power": 1.0, "margin": margin}


CANDIDATES = [candidate(margin) for margin in MARGINS]


def read(folder: Path) -> list[Results]:
    """Models with complete results; learned families are those that choose.py uses."""
    known = {one.manifest["model"]: one.learned for one in read_all(RESULTS, "validation")}
    every = read_all(folder, "validation")
    models = [replace(one, learned=known.get(one.manifest["model"], one.learned)) for one in every]
    return [one for one in models if all(answered([one], c) for c in CANDIDATES)]


def chosen(results: list[Results]) -> float:
    """The margin that the rule picks."""
    tied = [row for row in rank(results, CANDIDATES) if row["tied"]]
    best = max(tied, key=lambda row: preference(row, VIDEOS))
    return float(best["options"]["margin"])


def page(results: list[Results]) -> str:
    best, rows = chosen(results), []
    for r in rank(results, CANDIDATES):
        margin, (low, high) = r["options"]["margin"], r["difference"]
        name = f"**{margin:g}**" if margin == best else f"{margin:g}"
        difference = f"[{low:+.2%}, {high:+.2%}]" + (" tied" if r["tied"] else "")
        rows.append([name, f"{r['score']:.2%}", difference, f"{100 * r['spare']:+.2f}"])
    head = ["margin", "score", "difference to best (95 %)", "to spare"]
    parts = [
        "# Why is the margin of condiv 0.2?",
        "`python -m benchmarks.accuracy.studies.margin`",
        table(head, rows),
        INTRO,
        "\n".join(
            f"- {one.manifest['model']}: {publishing.commits(one.manifest['runs'])}."
            for one in results
        ),
    ]
    return "\n\n".join(parts) + "\n"


def records(one: Results) -> list[dict[str, Any]]:
    """Accuracy per family, ratio and margin: rows of the CSV file."""
    labels = {(0.0, None): FULL}
    for (i, ratio), margin in itertools.product(enumerate(RATIOS), MARGINS):
        labels[ratio, margin] = settings(candidate(margin))[i].label
    return [
        {"model": one.manifest["model"], "ratio": ratio, "margin": margin}
        | {family: one.accuracy(label, family) for family in FAMILIES}
        for (ratio, margin), label in labels.items()
    ]


def files(folder: Path = FOLDER) -> Files:
    """The page and its data."""
    results = read(folder)
    data = publishing.csv_text([row for one in results for row in records(one)])
    return {folder.with_suffix(".md"): page(results), folder.with_suffix(".csv"): data}


def main() -> None:
    write(files(run_missing(str(__doc__), lambda *_: CANDIDATES, 400, FAMILIES, FOLDER)))


if __name__ == "__main__":
    with one_message():
        main()
