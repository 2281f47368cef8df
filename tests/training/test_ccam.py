"""CCAM: the projector against a dense masked reference, in a model, and its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ccam import dense

from tokencomp.errors import OptionError, WeightsError
from tokencomp.reducers._trained import load
from tokencomp.reducers.ccam import Ccam
from tokencomp.trained.ccam import CCAMProjector, ProjectorConfig, places_2d
from tokencomp.training.ccam import (
    CcamConfig,
    train_ccam,
)

SMALL = CcamConfig(
    queries=3, steps=4, align=2, batch=2, samples=8, kind="image", evaluate=2, save_every=2
)


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_ccam(*tiny, data, tmp_path_factory.mktemp("ccam"), SMALL)


def test_training_changes_the_projector_alone(trained: Path, tiny: Any) -> None:
    card = json.loads(trained.with_suffix(".json").read_text())
    assert len(card["loss"]) == 4
    assert [r["name"] for r in card["accuracy"]] == ["full", "ccam", "pool", "random"]
    assert {r["tokens"] for r in card["accuracy"][1:]} == {3.0}
    assert all(p.requires_grad and p.grad is None for p in tiny[0].parameters())
    torch.manual_seed(SMALL.seed)
    fresh = CCAMProjector(SMALL.sizes(tiny[0])).state_dict()
    after = load(Ccam, trained)[0].state_dict()
    assert all(not torch.equal(fresh[k], after[k]) for k in fresh)


@pytest.mark.parametrize("queries", [9, 100])
def test_media_of_no_more_tokens_than_queries(
    queries: int, tiny: Any, data: str, tmp_path: Path
) -> None:
    """Pictures of nine tokens: refused before the first step, not upsampled."""
    model, processor = tiny
    config = replace(SMALL, queries=queries)
    with pytest.raises(OptionError, match=f"queries={queries}: .* has 9 visual tokens"):
        train_ccam(model, processor, data, tmp_path, config)
    assert not list(tmp_path.iterdir())


SMALL_CCAM = ProjectorConfig(queries=6, width=16, heads=2, mlp=24, kv_dim=10, out_dim=12)


def projector(**changes: object) -> CCAMProjector:
    torch.manual_seed(0)
    made = CCAMProjector(replace(SMALL_CCAM, **changes)).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_dense_masked_reference(causal: bool) -> None:
    """F dividing Q, not dividing it, above it, and one image."""
    made = projector(causal=causal)
    for frames in (1, 2, 4, 6, 7, 13):
        x = torch.randn(2, frames * 5, 10, dtype=torch.float64)
        got = made(x, frames)
        for b in range(2):
            torch.testing.assert_close(got[b], dense(made, x[b], frames), atol=1e-10, rtol=1e-8)


def test_places_are_added_to_keys_frame_by_frame() -> None:
    made = projector(spatial=True)
    x = torch.randn(1, 3 * 6, 10, dtype=torch.float64)
    places = places_2d(2, 3, 16, x.device).double()
    assert len(places.unique(dim=0)) == 6
    torch.testing.assert_close(made(x, 3, (2, 3))[0], dense(made, x[0], 3, places))


def test_saved_projectors_load_and_answer_the_same(tmp_path: Path) -> None:
    made = projector(spatial=True).float()
    path = made.save(tmp_path / "new", {"model_id": "x"})
    assert sorted(p.name for p in path.parent.iterdir()) == ["ccam.json", "ccam.safetensors"]
    x = torch.randn(1, 12, 10)
    again = load(Ccam, path)[0]
    assert again.config == made.config
    assert torch.equal(again(x, 2, (2, 3)), made(x, 2, (2, 3)))


def test_broken_files_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        load(Ccam, tmp_path / "ccam.safetensors")
    path = projector().save(tmp_path)
    card = json.loads((tmp_path / "ccam.json").read_text())
    card["ccam"]["queries"] = 7
    (tmp_path / "ccam.json").write_text(json.dumps(card))
    with pytest.raises(WeightsError, match="size mismatch"):
        load(Ccam, path)
    for sizes, message in (
        ({"width": 10, "heads": 3}, "heads divides"),
        ({"heads": 0}, "above 0"),
        ({"queries": 2.5}, "expected an integer"),
    ):
        with pytest.raises(OptionError, match=message):
            ProjectorConfig(**sizes)


def test_inputs_of_another_dtype_are_cast_in_and_back() -> None:
    """As a frozen bf16 model hands them to weights that are trained in fp32."""
    made = projector().float()
    x = torch.randn(1, 12, 10).bfloat16()
    got = made(x, 2)
    assert got.dtype == torch.bfloat16 and torch.equal(got, made(x.float(), 2).bfloat16())
    got.float().sum().backward()
    assert made.query.grad is not None and made.query.grad.dtype == torch.float32
