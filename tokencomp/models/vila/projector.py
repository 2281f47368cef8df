"""The projectors of VILA and NVILA, which are a space-to-depth step and a small MLP."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tokencomp.errors import CheckpointError

Order = Literal["rows", "columns"]
DOWNSAMPLE = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
KINDS = ("linear", "identity", "mlp2x_gelu (any depth)", *DOWNSAMPLE)


def tokens_per_side(kind: str, patches: int) -> int:
    """Tokens per side of an image that has `patches` patches per side, under a projector type."""
    return -(-patches // DOWNSAMPLE.get(kind, 1))


class SpaceToDepth(nn.Module):
    """Concatenate the channels of every factor × factor block of patches, row by row.

    Sides that `factor` does not divide are padded with zeros at the bottom and at the right.
    `order` is the order of the blocks. "columns" runs down each column first, as in the training
    code of the VILA-1.5 releases; the "_fix" projectors of NVILA run along rows.
    """

    def __init__(self, factor: int, order: Order = "rows") -> None:
        super().__init__()
        self.factor, self.order = factor, order

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, side², C) to (B, ⌈side / factor⌉², factor² · C)."""
        batch, n, channels = x.shape
        side, f = round(n**0.5), self.factor
        small = -(-side // f)
        x = x.view(batch, side, side, channels)
        pad = small * f - side
        x = nn.functional.pad(x, (0, 0, 0, pad, 0, pad))
        x = x.view(batch, small, f, small, f, channels)
        x = x.permute(0, 1, 3, 2, 4, 5) if self.order == "rows" else x.permute(0, 3, 1, 2, 4, 5)
        return x.reshape(batch, small * small, f * f * channels)


class VilaProjector(nn.Module):
    """Map vision features to LLM embeddings, with the parameter names of published checkpoints.

    `kind` is the `mm_projector_type` of the checkpoint. The order of the output tokens is "columns"
    for `mlp_downsample` and "rows" for all other kinds.
    """

    def __init__(self, kind: str, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.factor = DOWNSAMPLE.get(kind, 1)
        self.order: Order = "columns" if kind == "mlp_downsample" else "rows"
        self.layers = _build(kind, vision_size, hidden_size, self.factor, self.order)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, patches, vision_size) to (B, tokens, hidden_size)."""
        return self.layers(features)


def _build(kind: str, vision: int, hidden: int, factor: int, order: Order) -> nn.Module:
    """Build the layers of one projector type; their indices are part of the parameter names."""
    wide = factor * factor * vision
    layers: list[nn.Module]
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision, hidden)
    if kind in DOWNSAMPLE:
        layers = [SpaceToDepth(factor, order), nn.LayerNorm(wide)]
        if kind == "mlp_downsample_3x3_fix":
            layers += [nn.Linear(wide, 3 * vision), nn.GELU(), nn.LayerNorm(3 * vision)]
            wide = 3 * vision
        return nn.Sequential(*layers, nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if depth is None or int(depth[1]) < 1:
        raise CheckpointError(
            f"mm_projector_type={kind!r}: unknown projector. Known: {', '.join(KINDS)}. The "
            "multi-scale (s2) variants are not supported."
        )
    layers = [nn.Linear(vision, hidden)]
    for _ in range(int(depth[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


def load_projector(projector: VilaProjector, folder: Path) -> None:
    """Load weights from `model.safetensors` or `pytorch_model.bin` in `folder`."""
    from safetensors.torch import load_file

    safe, old = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not list(projector.parameters()):
        return
    state = load_file(safe) if safe.exists() else torch.load(old, "cpu", weights_only=True)
    projector.load_state_dict(state)


def save_projector(projector: VilaProjector, folder: Path) -> None:
    """Write `model.safetensors` to `folder`."""
    from safetensors.torch import save_file

    state = {k: v.contiguous().cpu() for k, v in projector.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
