"""The page on every family, against counts by hand and the published results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from accuracy_support import BLIND, ITEMS, SHARES, made_up

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


@pytest.mark.parametrize("seed", range(5))
def test_holm_by_its_definition(accuracy, seed: int) -> None:
    """Rejected at any level: the smallest p-values, as long as p(k) < level / (m - k)."""
    values = np.random.default_rng(seed).uniform(0, 0.1, 7).round(2).tolist()  # with ties
    adjusted = accuracy.baselines.holm(values)
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for k, i in enumerate(sorted(range(7), key=values.__getitem__)):
            if values[i] * (7 - k) >= level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p < level} == rejected
    assert accuracy.baselines.holm([]) == []


def test_page_by_plain_counting(accuracy, tmp_path: Path) -> None:
    """24 of 40 right, against 14, 20 and 26: of 9 comparisons, 6 won and 3 lost."""
    made_up(tmp_path, {"full": 0.7}, "validation")
    made_up(tmp_path, {**SHARES, "condiv-0.9": 0.6})
    text = accuracy.baselines.page(accuracy.report.read_all(tmp_path), "condiv")
    told = [
        "In 9 comparisons the default got more right in 6 (3 of them significant), as many in 0,",
        "fewer in 3 (0 significant, 2 on families that the model has learned; smallest p",
        "before the correction 0.5).",
    ]
    assert " ".join(told) in text.splitlines()
    rows = [line for line in text.splitlines() if line.startswith("| made-up")]
    worst = "-5.0 (downscale, 0.9; p = 0.5)"
    assert rows == [
        f"| made-up | {family} | {learned} | 40 | 70.0% | 3 | 2 | 1 | {worst} |"
        for family, learned in (("attribute", "yes"), ("needle", "yes"), ("position", "no"))
    ]


def test_the_most_questions_count(accuracy, tmp_path: Path) -> None:
    made_up(tmp_path / "more", {**SHARES, "condiv-0.9": 0.6})
    few = made_up(tmp_path / "few", {**SHARES, "condiv-0.9": 0.3})
    rows = [json.loads(line) for line in (few / "test.jsonl").read_text().splitlines()]
    kept = [row for row in rows if not row["id"].endswith("-7")]
    (few / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    every = [one for part in ("few", "more") for one in accuracy.report.read_all(tmp_path / part)]
    for order in (every, every[::-1]):
        found = accuracy.baselines.largest(order)
        assert list(found) == [("made-up", family) for family in sorted(BLIND)]
        assert all(len(one.scores("full", families=[f])) == ITEMS for (_, f), one in found.items())


def test_published_pages_are_those_of_the_published_results(scripts) -> None:
    baselines = scripts.baselines
    every = baselines.read()
    assert (FOLDER / "baselines.md").read_text() == baselines.page(every)
    models, families = scripts.run.available_models(), scripts.run.FAMILIES
    assert {*baselines.largest(every)} == {(m, f) for m in models for f in families}


def test_the_readme_says_what_the_page_says() -> None:
    page, readme = ((FOLDER / n).read_text() for n in ("baselines.md", "../../README.md"))
    found = re.search(
        r"In (\d+) comparisons .* more right in (\d+) .* as many in (\d+), fewer in (\d+) "
        r"\((\d+) significant, (\d+) on families .* correction (\S+)\)",
        page,
    )
    every, ahead, level, behind, significant, learned, p = found.groups()
    assert learned == "0"
    told = " ".join(readme.split())
    assert f"ahead in {ahead} of [{every} cases](benchmarks/accuracy/baselines.md)," in told
    assert f"level in {level}, behind in {behind}, no learned family among these" in told
    assert f"(smallest p {p}, {significant} significant)" in told


@pytest.mark.parametrize("name", ["unseen", "counting", "chance"])
def test_published_parts_too(scripts, name: str) -> None:
    report, folder = scripts.report, FOLDER / name
    assert (folder / "README.md").read_text() == report.text(folder)
    shown = {
        f"{one.manifest['model']}-{kind}.svg"
        for one in report.read_all(folder)
        for kind in report.plotted(one)
    }
    assert {path.name for path in folder.glob("*.svg")} == shown
