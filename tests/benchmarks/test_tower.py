"""The pages of the tower stage say what their records say."""

from __future__ import annotations

import pytest

from benchmarks.accuracy.library import difference
from benchmarks.accuracy.studies import tower as study
from benchmarks.models import tower


def test_verdicts_of_the_study() -> None:
    """96 of 100 against a ceiling of 100: below the first bar, above the second."""

    def rights(count: int) -> list[int]:
        return [1] * count + [0] * (100 - count)

    answers = {"full@0": rights(100), "entry only@0": rights(100)}
    answers |= {"kcentre@0.5": rights(96), "kcentre@0.6": rights(95), "kcentre@0.75": rights(93)}
    answers |= {"downscale@0.5": rights(80), "downscale@0.75": rights(93)}
    said = "\n".join(study.verdicts(answers))
    assert "at 0.5 keeps 96.0% of entry only: it misses 97%" in said
    assert "at 0.75 keeps 93.0% of entry only: it meets 92%" in said
    assert "k-centre at 0.5 is above downscale at 0.5: +16.0 points" in said
    assert "k-centre at 0.75 is not different from downscale at 0.75: +0.0 points" in said
    book = {key: "".join(map(str, value)) for key, value in answers.items()}
    entry = {"model": "m", "split": "test", "families": ["count"], "answers": book}
    assert said in study.page({"sets": {"qwen-images": entry}})


def test_intervals_are_paired() -> None:
    """Equal answers differ by nothing, whichever questions are drawn."""
    same = difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    half = difference([1] * 50 + [0] * 50, [0] * 100)
    assert half.value == pytest.approx(0.5) and 0.35 < half.low < 0.45 < 0.55 < half.high < 0.65


def test_the_page_of_times() -> None:
    parts = dict.fromkeys(("preprocess", "tower", "choose", "rest", "reduce", "prefill"), 1.0)
    record = {
        "case": "qwen-image", "tokens": 1024, "machine": "here",
        "parts": {"full": {**parts, "total": 12.0}, "both": {**parts, "total": 3.0}},
        "speedup": {"full": 1.0, "both": 4.0},
    }  # fmt: skip
    text = tower.page([record])
    assert "| 12.00 s | 1.00× | here |" in text and "| 3.00 s | 4.00× | here |" in text
