"""The projector is compared with plain loops over blocks of patches."""

from __future__ import annotations

import pytest
import torch
from support.family.vila_folder import projector_state
from torch import Tensor
from torch.nn import functional as F

from tokencomp.errors import CheckpointError
from tokencomp.models import VilaProjector
from tokencomp.models.vila.projector import tokens_per_side

VISION, HIDDEN = 6, 10


def blocks(x: Tensor, factor: int, columns: bool) -> Tensor:
    """Apply space to depth one block at a time."""
    side = int(len(x) ** 0.5)
    small = (side + factor - 1) // factor
    out = {}
    for i in range(small):
        for j in range(small):
            parts = []
            for di in range(factor):
                for dj in range(factor):
                    r, c = i * factor + di, j * factor + dj
                    inside = r < side and c < side
                    parts.append(x[r * side + c] if inside else torch.zeros(x.shape[1]))
            out[i, j] = torch.cat(parts)
    order = [(i, j) for j in range(small) for i in range(small)] if columns else sorted(out)
    return torch.stack([out[at] for at in order])


def reference(kind: str, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Apply the projector layer by layer with the weights of a checkpoint."""

    def norm(x: Tensor, at: int) -> Tensor:
        weight = w[f"layers.{at}.weight"]
        return F.layer_norm(x, weight.shape, weight, w[f"layers.{at}.bias"])

    def linear(x: Tensor, at: int) -> Tensor:
        return x @ w[f"layers.{at}.weight"].T + w[f"layers.{at}.bias"]

    if kind == "mlp2x_gelu":
        return linear(F.gelu(linear(x, 0)), 2)
    if kind == "mlp_downsample_3x3_fix":
        x = F.gelu(linear(norm(blocks(x, 3, False), 1), 2))
        return linear(F.gelu(linear(norm(x, 4), 5)), 7)
    x = norm(blocks(x, 2, kind == "mlp_downsample"), 1)
    return linear(F.gelu(linear(x, 2)), 4)


@pytest.mark.parametrize(
    "kind", ["mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix", "mlp2x_gelu"]
)
def test_reference(kind: str) -> None:
    state = projector_state(kind, VISION, HIDDEN)
    projector = VilaProjector(kind, VISION, HIDDEN)
    projector.load_state_dict(state)
    for side in (1, 4, 6, 7, 8):
        x = torch.randn(3, side * side, VISION)
        expected = torch.stack([reference(kind, state, image) for image in x])
        torch.testing.assert_close(projector(x), expected, atol=1e-5, rtol=1e-5)
        assert tokens_per_side(kind, side) ** 2 == expected.shape[1]


def test_unknown_projector_types_are_refused() -> None:
    with pytest.raises(CheckpointError, match="mlp_downsample_2x2_fix"):
        VilaProjector("mlp_downsample_3x3_s2", VISION, HIDDEN)
