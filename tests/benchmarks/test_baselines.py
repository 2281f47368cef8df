"""The page on every family, against counts by hand and the published results."""

from __future__ import annotations

import itertools
import re
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
    text = baselines.page(read_all(unpublished))
    verdict = [
        "In 9 comparisons the default is better in 6 (3 significant), equal in 0, and worse in 3",
        "(0 significant, 2 on families that the model has learned; smallest p",
        "before the correction 0.5).",
    ]
    assert " ".join(verdict) in text.splitlines()
    rows = [line for line in text.splitlines() if line.startswith("| made-up")]
    worst = "-5.0 (downscale, 0.9; p = 0.5)"
    assert rows == [
        f"| made-up | {family} | {learned} | 40 | 70.0% | 3 | 2 | 1 | {worst} |"
        for family, learned in (("attribute", "yes"), ("needle", "yes"), ("position", "no"))
    ]


def test_the_results_in_short_say_what_the_page_says() -> None:
    page, short = ((FOLDER / n).read_text() for n in ("baselines.md", "../../docs/evaluation.md"))
    match = re.search(
        r"In (\d+) comparisons .* better in (\d+) .* equal in (\d+), and worse in (\d+) "
        r"\((\d+) significant, (\d+) on families .* correction (\S+)\)",
        page,
    )
    assert match is not None
    every, better, equal, worse, significant, learned, _ = match.groups()
    text = " ".join(short.split())
    assert (
        f"better in {better} of [{every} comparisons](../benchmarks/accuracy/baselines.md)" in text
    )
    assert f"equal in {equal}, and worse in {worse}" in text
    assert f"{significant} of the {worse} are significant" in text
    assert f"{learned} of the {worse} concern a question family that the model has learned" in text


def test_the_table_of_the_results_in_short_is_part_of_the_summary() -> None:
    summary = (FOLDER / "summary.md").read_text().splitlines()
    short = (FOLDER / "../../docs/evaluation.md").read_text().splitlines()
    start = short.index(next(line for line in summary if line.startswith("| method")))
    rows = [*itertools.takewhile(lambda line: line.startswith("|"), short[start:])]
    assert 4 < len(rows) <= 10 and [row for row in rows if row not in summary] == []
