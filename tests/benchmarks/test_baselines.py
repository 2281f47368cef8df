"""The page on every family, against counts by hand and the published results."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from support.accuracy import SHARES, write_results

from benchmarks.accuracy.store import read_all
from benchmarks.accuracy.studies import baselines

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


@pytest.mark.parametrize("seed", range(5))
def test_holm_by_its_definition(seed: int) -> None:
    """Rejected at any level: the smallest p-values, as long as p(k) < level / (m - k)."""
    values = np.random.default_rng(seed).uniform(0, 0.1, 7).round(2).tolist()  # with ties
    adjusted = baselines.holm(values)
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for k, i in enumerate(sorted(range(7), key=values.__getitem__)):
            if values[i] * (7 - k) >= level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p < level} == rejected
    assert baselines.holm([]) == []


def test_page_by_plain_counting(unpublished: Path) -> None:
    """24 of 40 right, against 14, 20 and 26: of 9 comparisons, 6 won and 3 lost."""
    write_results(unpublished, {"full": 0.7}, "validation")
    write_results(unpublished, {**SHARES, "condiv-0.9": 0.6})
    rows = baselines.compared(read_all(unpublished))
    assert len(rows) == 9 and sum(row["only_default_right"] > 0 for row in rows) == 6
    worse = [row for row in rows if row["baseline"] == "downscale"]
    assert [(row["only_baseline_right"], row["p"]) for row in worse] == [(2, 0.5)] * 3
    assert "| made-up | 9 | 6 | 3 | 0 | 3 | 0 | 2 |" in baselines.page(rows).splitlines()


def test_the_results_in_short_say_what_the_page_says() -> None:
    """The last row of the page, in docs/evaluation.md."""
    page, short = ((FOLDER / n).read_text() for n in ("baselines.md", "../../docs/evaluation.md"))
    line = next(line for line in page.splitlines() if line.startswith("| all |"))
    every, better, _, equal, worse, significant, learned = line.strip("| ").split(" | ")[1:]
    link = f"[{every} comparisons](../benchmarks/accuracy/baselines.md)"
    text = f"better in {better} of {link}, equal in {equal} and worse in {worse} ("
    text += f"{significant} significantly, {learned} on a family that the model has learned)"
    assert text in " ".join(short.split())


def test_the_table_of_the_results_in_short_is_part_of_the_page() -> None:
    page = (FOLDER / "README.md").read_text().splitlines()
    short = (FOLDER / "../../docs/evaluation.md").read_text().splitlines()
    start = short.index(next(line for line in page if line.startswith("| method")))
    rows = [*itertools.takewhile(lambda line: line.startswith("|"), short[start:])]
    assert 4 < len(rows) <= 15 and [row for row in rows if row not in page] == []
