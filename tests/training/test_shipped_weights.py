"""Trained parts that ship beside a packaged model are found, fit it, and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.trained import tiny as make_tiny

import tokencomp
from tokencomp import zoo
from tokencomp.errors import WeightsError
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.packaged import DEFAULT_MODEL
from tokencomp.training.data import load_batch, questions

MODELS = zoo.SAMPLES.parent / "models"
KINDS = ("selector", "ccam")
SIBLINGS = {"tiny-qwen3-5", "tiny-gemma3"}
SHIPPED = sorted(
    (path.parents[1].name, path.stem)
    for kind in KINDS
    for path in MODELS.glob(f"*/tokencomp/{kind}.safetensors")
)
every_file = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name == DEFAULT_MODEL else [pytest.mark.long])
        for name, kind in SHIPPED
    ],
)


def test_every_packaged_model_but_the_siblings_has_them() -> None:
    names = set(zoo.available_models()) - SIBLINGS
    assert set(SHIPPED) == {(n, kind) for n in names for kind in KINDS}


@every_file
def test_found_without_a_path_and_runs(name: str, kind: str) -> None:
    """On images and videos, with fewer tokens and finite logits."""
    model, processor = load_model(name, device="cpu")
    for media in ("image", "video"):
        source = questions("shapesqa", media, 2, "test")
        inputs, _ = load_batch([source[0], source[1]], processor, 8)
        with tokencomp.patch(model, 0.5, reducer=kind) as handle, torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        assert torch.isfinite(logits).all()
        left = [seen[-1] for seen in handle.stats.tokens_after]
        assert all(0 < a < b for a, b in zip(left, handle.stats.tokens_before, strict=True))


def test_other_checkpoints_refuse_them(tmp_path: Path) -> None:
    other, _ = make_tiny(tmp_path)
    for name, kind in SHIPPED:
        with pytest.raises(WeightsError, match="trained for"):
            tokencomp.patch(other, 0.5, reducer=kind, weights=str(MODELS / name))
