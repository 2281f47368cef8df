"""A stand-in for a release of transformers that is newer than the tested ones."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.families import FAMILIES
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention

import tokencomp
from tokencomp.conformance import release, verify
from tokencomp.errors import UntestedReleaseError, UntestedReleaseWarning

NEWER = "5.99.0"


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A newer release and an empty cache, on disk and in this process."""
    monkeypatch.setattr(transformers, "__version__", NEWER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verify, "_passed", {})
    return release.folder()


def break_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that fades by row number: dropping a token changes what others see."""
    stock = Qwen2VLAttention.forward

    def fading(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        rows = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None, :, None]
        return stock(self, hidden_states * 0.9**rows, *args, **kwargs)

    monkeypatch.setattr(Qwen2VLAttention, "forward", fading)


def no_check(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the model was checked again")


def test_a_model_is_verified_once_and_a_note_holds_it(
    notes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = FAMILIES["qwen2_vl"].build()
    state = torch.get_rng_state(), torch.get_num_threads()
    with caplog.at_level(logging.INFO, "tokencomp"):
        tokencomp.patch(model, 0.5).remove()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert torch.get_num_threads() == state[1]
    assert f"verified here on transformers {NEWER} (exact)" in caplog.text
    assert len([*notes.iterdir()]) == 1
    monkeypatch.setattr(release, "verify_model", no_check)
    tokencomp.patch(model, 0.5).remove()
    tokencomp.patch(FAMILIES["qwen2_vl"].build(), 0.25).remove()
    with pytest.raises(AssertionError, match="again"):  # another config
        tokencomp.patch(FAMILIES["llava_onevision"].build(), 0.5)


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"status": "exact"}', "\0"])
def test_a_broken_note_is_made_again(notes: Path, broken: str) -> None:
    model = FAMILIES["qwen2_vl"].build()
    tokencomp.patch(model, 0.5).remove()
    (note,) = notes.iterdir()
    content = note.read_text()
    note.write_text(broken)
    tokencomp.patch(model, 0.5).remove()
    assert note.read_text() == content


def test_a_failing_check_is_an_error_that_names_the_way_out(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["qwen2_vl"].build()
    break_attention(monkeypatch)
    for _ in range(2):  # a failure leaves no note
        with pytest.raises(UntestedReleaseError, match=r"entry: difference.*pip install transf"):
            tokencomp.patch(model, 0.5)
    monkeypatch.setenv("TOKENCOMP_ALLOW_UNTESTED", "1")
    with pytest.warns(UntestedReleaseWarning, match=NEWER):
        tokencomp.patch(model, 0.5).remove()


def test_a_cache_that_cannot_be_written_is_said(
    notes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notes.parent.parent.mkdir(parents=True)
    notes.parent.write_text("a file where the folder should be")
    tokencomp.patch(FAMILIES["qwen2_vl"].build(), 0.5).remove()
    assert "The next process verifies the model again" in caplog.text


def test_two_processes_at_once(notes: Path) -> None:
    """Both verify, and the later note replaces the other."""
    code = (
        "import sys, tokencomp; from tokencomp import zoo\n"
        "model, _ = zoo.load('tiny-qwen2-vl')\n"
        "import transformers; transformers.__version__ = sys.argv[1]\n"
        "tokencomp.patch(model, 0.5)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, NEWER]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len([*notes.iterdir()]) == 1


def test_the_tested_release_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "verify_model", no_check)
    tokencomp.patch(FAMILIES["qwen2_vl"].build(), 0.5).remove()
