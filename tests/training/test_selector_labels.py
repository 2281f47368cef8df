"""Labels of the selector: questions explained in batches, on disk, and read again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trained import SELECTOR, broken, write_data

from tokencomp.errors import MediaError, OptionError, ScoreError
from tokencomp.training.data import questions
from tokencomp.training.relevance import attention_bytes
from tokencomp.training.selector import labels as selector_labels
from tokencomp.training.selector.labels import explain_batch
from tokencomp.training.selector.train import train_selector


def test_explained_batches_do_not_depend_on_their_company(
    tiny: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, one by one, and as many at once as memory allows."""
    source = questions(data, "image", 5)
    examples = [source[i] for i in range(5)]
    together = explain_batch(*tiny, examples, SELECTOR)
    alone = [explain_batch(*tiny, [example], SELECTOR)[0] for example in examples]
    monkeypatch.setattr(selector_labels, "MEMORY", 2 * attention_bytes(tiny[0], 1, 40) - 1)
    some = explain_batch(*tiny, examples, SELECTOR)
    for other in (alone, some):
        for a, b in zip(together, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_second_run_reads_labels_and_checkpoint(
    trained: Path, tiny: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("explained again")

    monkeypatch.setattr(selector_labels, "explain_batch", refuse)
    before = trained.read_bytes()
    assert train_selector(*tiny, data, trained.parent, SELECTOR).read_bytes() == before
    with pytest.raises(OptionError, match="answers"):
        train_selector(*tiny, data, trained.parent, replace(SELECTOR, answers="given"))


def test_labels_of_other_data_are_refused(
    trained: Path, tiny: Any, data: str, tmp_path: Path
) -> None:
    output, copy = tmp_path / "out", tmp_path / "data"
    shutil.copytree(trained.parent, output)
    shutil.copytree(data, copy)
    with pytest.raises(OptionError, match="differs in data"):
        train_selector(*tiny, str(copy), output, SELECTOR)
    lines, before = Path(data) / "questions.jsonl", (Path(data) / "questions.jsonl").read_text()
    try:
        lines.write_text(before.replace("circle", "square"))
        with pytest.raises(OptionError, match="differs in content"):
            train_selector(*tiny, data, output, SELECTOR)
    finally:
        lines.write_text(before)


def test_what_cannot_be_explained_leaves_nothing(tiny: Any, data: str, tmp_path: Path) -> None:
    """A broken picture, and a model that computes NaN."""
    folder, output = write_data(tmp_path / "data", 40), tmp_path / "out"
    for picture in folder.glob("*.png"):
        picture.write_bytes(b"junk")
    with pytest.raises(MediaError):
        train_selector(*tiny, str(folder), output, SELECTOR)
    with pytest.raises(ScoreError, match="NaN"):
        train_selector(broken(tiny[0]), tiny[1], data, output, SELECTOR)
    assert not output.exists()
    output.write_text("")
    with pytest.raises(OptionError, match="is not a folder"):
        train_selector(*tiny, data, output, SELECTOR)
