"""The order of methods in our results and in those of third parties: the page of stored numbers.

    python -m benchmarks.accuracy.studies.order    # third_party.json, results/ → order.md

`third_party.json` has published numbers and where they were published. Nothing is measured here:
ours are the stored answers of the tiny Qwen3-VL to test questions about images.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.report import table
from benchmarks.accuracy.store import ACCURACY, MAIN, RESULTS, Results
from benchmarks.experiment import Files, write
from benchmarks.publishing import csv_text

SOURCES = Path(__file__).with_name("third_party.json")
RATIOS = (0.5, 0.75, 0.9)
LEVEL = 0.05
Scores = Mapping[str, float]


def nearest(ratio: float) -> float:
    """Our ratio for one of theirs."""
    return min(RATIOS, key=lambda x: abs(x - ratio))


def ours(results: Results, ratio: float) -> dict[str, float]:
    """Accuracy in percent on images, by reducer without options."""
    return {
        setting["reducer"]: 100 * float(np.mean(results.scores(label, "images")))
        for label, setting in results.settings.items()
        if setting["ratio"] == ratio and not setting["options"]
    }


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    x = np.asarray(values)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def chance(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of all orders of `b` whose correlation with `a` is at least as large: a one-sided p."""
    found, least = 0, spearman(a, b) - 1e-9
    orders = [*itertools.permutations(b)]
    for order in orders:
        found += spearman(a, order) >= least
    return found / len(orders)


def rows(sources: Sequence[dict[str, Any]], results: Results) -> list[dict[str, Any]]:
    """One row per source, ratio and method that both have."""
    out = []
    for source in sources:
        for ratio, theirs in source["scores"].items():
            here = ours(results, nearest(float(ratio)))
            for method in [m for m in theirs if m in here]:
                facts = {"source": source["name"], "ratio": float(ratio), "method": method}
                facts |= {"theirs": theirs[method], "full": source["full"]}
                out.append(facts | {"our_ratio": nearest(float(ratio)), "ours": here[method]})
    return out


def by_cell(every: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in every:
        cells.setdefault((row["source"], row["ratio"]), []).append(row)
    return cells


def order(some: Sequence[dict[str, Any]], key: str) -> str:
    """Methods from the best to the worst, with their numbers."""
    best = sorted(some, key=lambda row: -row[key])
    return ", ".join(f"{row['method']} {row[key]:.1f}" for row in best)


def correlations(every: Sequence[dict[str, Any]], without: Sequence[str] = ()) -> list[list[str]]:
    """Rows of the table of correlations; `without` leaves methods out."""
    out = []
    for (source, ratio), some in by_cell(every).items():
        chosen = [row for row in some if row["method"] not in without]
        if len(chosen) > 2:
            a, b = ([row[key] for row in chosen] for key in ("theirs", "ours"))
            p = f"{chance(a, b):.2f}"
            out.append([source, f"{ratio:g}", str(len(chosen)), f"{spearman(a, b):+.2f}", p])
    return out


def wins(every: Sequence[dict[str, Any]], better: str, worse: str) -> str:
    """In how many cells one method is above another: theirs, then ours."""
    cells = []
    for some in by_cell(every).values():
        found = {row["method"]: row for row in some}
        if better in found and worse in found:
            cells.append((found[better], found[worse]))
    counts = [sum(a[key] > b[key] for a, b in cells) for key in ("theirs", "ours")]
    return f"{counts[0]} of {len(cells)} | {counts[1]} of {len(cells)}"


HEAD = """# Order of methods: our results and those of third parties

`python -m benchmarks.accuracy.studies.order`. Third-party numbers are the published ones
([values and sources](studies/third_party.json)); none of them was run here. Ours are the right
answers of the tiny Qwen3-VL to {count} test questions about images ([results](README.md), full
model {full:.1f} %) at the nearest of the ratios 0.5, 0.75 and 0.9. Only the order is compared: a
model of 3 million parameters on drawn scenes says nothing about the size of a loss at 7B.
"""
PAIRS = [
    ("divprune", "fastv"), ("visprune", "fastv"), ("scope", "divprune"), ("scope", "visionzip"),
    ("dart", "fastv"), ("visionzip", "fastv"), ("visprune", "sparsevlm"), ("divprune", "random"),
    ("fastv", "random"), ("downscale", "fastv"), ("random", "uniform"),
]  # fmt: skip
READING = """
## Where they agree, and where not

- **Agree.** `divprune`, `scope` and `visprune` are above `fastv` in every table, and here. A
  uniform grid is no better than random tokens on Qwen3-VL, and here.
- **Not on random tokens.** In UniPruneBench `random` beats `fastv` on two of three models, and on
  LLaVA-1.5 four of five methods up to 0.778; in the audit it beats all three on LLaVA-1.5. Here it
  is far below every method: each of our questions asks for one small thing, while many of theirs
  can be answered from other parts of the picture. Our tables exaggerate the gain over chance.
- **Not on fewer pixels.** In VTC-Bench smaller pictures beat all three methods at equal tokens.
  Here they lose to all three: the things asked about are few pixels wide.
- **Not on `dart` and `sparsevlm`.** `dart` is last in AngelSlim at 0.75 and first here; `sparsevlm`
  is first on LLaVA-1.5 in UniPruneBench up to 0.778 and the last but `random` here.
- **What follows.** {significant} of {count} rank correlations are above chance (p < 0.05), all of
  three to six methods; with three, p is never below 0.17. So others confirm a few pairs of our
  table, not its order. None of them has measured the default, merging with weights; RESTORE (arXiv
  2606.01711) adds such weights to three methods on LLaVA-1.5 and reports a gain.
- **Not compared.** EffiVLM-Bench (arXiv 2506.00479): its abstract and code could be read, not its
  tables. Our column "agreement with the full model" is its idea of loyalty.

## Documents

From the audit (Qwen3-VL-8B): with 30 % fewer tokens, pages of about 784 tokens lose 8 points at
random and 12 on a grid. Here a word is read from one line of large letters, of which
[93 % are read at 0.5](unseen/README.md); that says nothing about pages.
"""


def files() -> Files:
    """The page and its CSV file."""
    stored = json.loads(SOURCES.read_text())
    results = Results.read(RESULTS / MAIN, "test").averaged()
    every = rows(stored["sources"], results)
    scores, found = results.scores("full", "images"), correlations(every)
    significant = sum(float(row[-1]) < LEVEL for row in found)
    parts = [
        HEAD.format(count=len(scores), full=100 * float(np.mean(scores))),
        READING.format(significant=significant or "None", count=len(found)),
    ]
    documents = [[d["task"], d["kept"], *(f"{d[k]:.1f}" for k in ("full", "random", "uniform"))]
            for d in stored["documents"]]  # fmt: skip
    parts.append(table(["task", "kept", "full", "random", "uniform"], documents))
    head = ["measured by", "ratio", "methods", "Spearman", "p"]
    parts.append(
        "\n## Rank correlations\n\np is the share of all orders of the same methods that agree at\n"
        "least as well: exact, one-sided, not corrected for the number of rows.\n"
    )
    parts.append(table(head, found))
    parts.append("\nWithout `random`, `uniform` and `downscale`:\n")
    parts.append(table(head, correlations(every, ("random", "uniform", "downscale"))))
    parts.append("\n## Pairs\n\nIn how many cells the first is above the second.\n")
    pairs = [[f"`{a}` above `{b}`", *wins(every, a, b).split(" | ")] for a, b in PAIRS]
    parts.append(table(["pair", "theirs", "ours"], pairs))
    parts.append("\n## Every cell\n")
    cells = [[f"{source}, {ratio:g}", order(some, "theirs"), order(some, "ours")]
             for (source, ratio), some in by_cell(every).items()]  # fmt: skip
    parts.append(table(["measured by, ratio", "theirs", "ours"], cells))
    parts.append("\n## Sources\n")
    parts += [f"- {s['name']}: {s['where']}; {s['what']}." for s in stored["sources"]]
    parts.append("\n[All rows](../README.md#tables-as-csv).")
    text, data = "\n".join(parts) + "\n", csv_text(every)
    return {ACCURACY / "order.md": text, ACCURACY / "order.csv": data}


if __name__ == "__main__":
    write(files())
