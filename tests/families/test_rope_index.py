"""Releases that place videos wrongly are refused, by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, text

import tokencomp
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers 5.3.0 … 5.5.4 compute: start times step, and axes of videos mixed up."""
    real = compat.rope_index

    def wrong(body: Any, ids: torch.Tensor, kinds: torch.Tensor, **grids: Any) -> torch.Tensor:
        positions = real(body, ids, kinds, **grids).clone()
        step = getattr(body.config.vision_config, "tokens_per_second", 1)
        visual = kinds > 0
        positions[0, visual] = positions[0, visual].min() * step
        return positions

    monkeypatch.setattr(compat, "rope_index", wrong)


def test_qwen25_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"transformers>=5\.6"):
        tokencomp.patch(FAMILIES["qwen2_5_vl"].build(), 0.5)


def test_qwen2_is_refused_for_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["qwen2_vl"]
    if family.no_video():
        pytest.skip("this release is one of them")
    broken(monkeypatch)
    model = family.build()
    with torch.no_grad(), tokencomp.patch(model, 0.5) as handle:
        model(**family.batch([[text(3), family.image(0), text(4)]]))
        assert handle.stats.ratio > 0.4
        with pytest.raises(UnsupportedModelError, match="videos"):
            model(**family.batch([[text(3), family.whole_video(4), text(4)]]))


def test_installed_release() -> None:
    """The probe agrees with a hand-made layout: 2 frames of 4×8 patches, 2 s apart."""
    family = FAMILIES["qwen2_5_vl"]
    reason = family.defect("")
    if reason:
        with pytest.raises(UnsupportedModelError):
            tokencomp.patch(family.build(), 0.5)
        return
    inputs = family.batch([[family.video(4), [5]]])
    positions = family.positions(family.build(), inputs)[:, 0]
    assert positions[0, 1:17].tolist() == [1] * 8 + [1 + 2 * 2] * 8
    assert positions[1, 1:17].tolist() == ([1] * 4 + [2] * 4) * 2
    assert positions[2, 1:17].tolist() == [1, 2, 3, 4] * 4


def test_videos_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["qwen2_vl"]
    if family.no_video():
        pytest.skip("this release places videos wrongly")
    model, calls, real = family.build(), [], compat.check_rope_index
    monkeypatch.setattr(compat, "check_rope_index", lambda m, k: calls.append(k) or real(m, k))
    inputs = family.batch([[text(3), family.whole_video(4), family.whole_video(4), text(4)]])
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform"):
        model(**inputs)
        model(**inputs)
    assert calls == ["image", "video"]


def test_doctor_says_what_patch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One source: both look at the positions that the installed release computes."""
    from tokencomp.cli._doctor import _mrope

    family = FAMILIES["qwen2_vl"]
    assert _mrope().ok is (None if family.no_video() else True)
    broken(monkeypatch)
    finding = _mrope()
    assert finding.ok is None
    for refused in ("images of Qwen2_5_VL", "videos of Qwen2_5_VL", "videos of Qwen2VL"):
        assert refused in finding.detail
    assert "transformers>=5.6" in finding.detail
