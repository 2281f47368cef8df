"""The ccam projector against a dense masked reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ccam import dense

from tokencomp.errors import OptionError, WeightsError
from tokencomp.trained.ccam import CCAMProjector, ProjectorConfig, places_2d

SMALL = ProjectorConfig(queries=6, width=16, heads=2, mlp=24, kv_dim=10, out_dim=12)


def projector(**changes: object) -> CCAMProjector:
    torch.manual_seed(0)
    made = CCAMProjector(replace(SMALL, **changes)).double()
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


def test_gradients_equal_the_dense_reference() -> None:
    made = projector()
    x = torch.randn(1, 4 * 3, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 12, dtype=torch.float64)
    (mine,) = torch.autograd.grad((made(x, 4)[0] * weights).sum(), x)
    (wanted,) = torch.autograd.grad((dense(made, x[0], 4) * weights).sum(), x)
    torch.testing.assert_close(mine, wanted)


def test_places_are_added_to_keys_frame_by_frame() -> None:
    made = projector(spatial=True)
    x = torch.randn(1, 3 * 6, 10, dtype=torch.float64)
    places = places_2d(2, 3, 16, x.device).double()
    assert len(places.unique(dim=0)) == 6
    torch.testing.assert_close(made(x, 3, (2, 3))[0], dense(made, x[0], 3, places))
    for grid in (None, (2, 4)):
        with pytest.raises(OptionError, match="spatial"):
            made(x, 3, grid)


def test_the_defaults_are_the_published_configuration() -> None:
    assert ProjectorConfig() == ProjectorConfig(
        queries=1024, width=1024, heads=16, mlp=4096, kv_dim=1152, out_dim=3584, eps=1e-5
    )
    with torch.device("meta"):
        made = CCAMProjector(ProjectorConfig())
    attention = 2 * (1024 * 1024 + 1024) + 2 * (1152 * 1024 + 1024)
    mlp = 2 * (1024 * 4096 + 4096) + 4096 * 1024 + 1024
    norms = 2 * (1024 + 1152 + 1024)
    total = 1024 * 1024 + attention + mlp + norms + 1024 * 3584 + 3584
    assert sum(p.numel() for p in made.parameters()) == total


def test_saved_projectors_load_and_answer_the_same(tmp_path: Path) -> None:
    made = projector(spatial=True).float()
    path = made.save(tmp_path / "new", {"model_id": "x"})
    assert sorted(p.name for p in path.parent.iterdir()) == ["ccam.json", "ccam.safetensors"]
    x = torch.randn(1, 12, 10)
    for given in (path, path.parent):
        again = CCAMProjector.load(given)
        assert again.config == made.config
        assert torch.equal(again(x, 2, (2, 3)), made(x, 2, (2, 3)))


def test_broken_files_and_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        CCAMProjector.load(tmp_path)
    path = projector().save(tmp_path)
    card = json.loads((tmp_path / "ccam.json").read_text())
    card["ccam"]["queries"] = 7
    (tmp_path / "ccam.json").write_text(json.dumps(card))
    with pytest.raises(WeightsError, match="size mismatch"):
        CCAMProjector.load(path)
    with pytest.raises(OptionError, match="shape"):
        projector()(torch.zeros(1, 6, 9, dtype=torch.float64), 2)
    for sizes, message in (
        ({"width": 10, "heads": 3}, "multiple"),
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
