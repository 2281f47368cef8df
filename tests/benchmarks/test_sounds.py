"""The benchmark on sounds: a toy run, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sounds import page, run
from benchmarks.stored import read_stored
from recipes.sounds.model import TOKENS, build, build_processor, build_tokenizer
from tokencomp.storage import write_json


def test_toy_run_makes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method reaches its ratio on clips; faster clips have as few tokens."""
    monkeypatch.setattr(run, "MARGIN", -1.0)
    tokenizer = build_tokenizer(tmp_path)
    model, processor = build(tokenizer).eval(), build_processor(tokenizer)
    results = run.answer(model, processor, 1, 6, tmp_path / "runs", run.settings((0.75,)))
    facts = {
        "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
        "hardware": {"cpu": "x", "threads": 1}, "finished": True, "stages": {"names": 1},
        "seconds": 1, "training_scores": {}, "parameters": 1,
    }  # fmt: skip
    path = write_json(tmp_path / "r.json", {"about": facts, "training": facts, **results})
    text = page.write_page(path, tmp_path / "r.md").read_text()
    for split in ("validation", "test"):
        rows = {row["label"]: row for row in results[split]["rows"]}
        assert len(rows) == 1 + 3 + len(run.METHODS)
        assert rows.pop("full")["visual_tokens"] == TOKENS
        for label, row in rows.items():
            assert row["reached"] == pytest.approx(0.75, abs=0.01), label
    assert "| fusion | 0.75 |" in text and "6 test questions" in text


@pytest.mark.long
def test_published_page_is_that_of_its_results() -> None:
    text = page.page(read_stored(page.RESULTS))
    assert page.PAGE.read_text().rstrip() == text.rstrip()
