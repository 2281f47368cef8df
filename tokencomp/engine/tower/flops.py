"""FLOPs of a vision tower and its projector, with and without the patches that a stage drops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.towers.base import Tower
from tokencomp.engine.tower.signals import attention_blocks


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a tower on which its FLOPs depend, except for sequence lengths.

    A multiplication and an addition are two FLOPs. Patch embedding, norms and activations are not
    counted.

    Attributes
    ----------
    row
        FLOPs of the linear layers of one block, per row.
    width
        Channels of all heads together.
    unused
        Number of blocks after those in use.
    token
        FLOPs of the projectors, per row of their input.
    """

    row: int
    width: int
    unused: int
    token: int

    @classmethod
    def of(cls, layout: Tower) -> TowerShape:
        block = layout.blocks[0]
        width = _width(attention_blocks(block)[0])
        token = sum(_linear(module) for module in layout.projectors)
        return cls(_linear(block), width, len(layout.unused), token)


def _linear(module: nn.Module) -> int:
    """FLOPs per row of all linear layers in `module`, in any form of weights."""
    products = 0
    for part in module.modules():
        sizes: list[Any] = [getattr(part, name, None) for name in ("in_features", "out_features")]
        inner = (m for m in part.modules() if m is not part)
        if None in sizes or any(hasattr(m, "in_features") for m in inner):  # a wrapper (LoRA)
            products += sum(p.numel() for p in part.parameters(recurse=False) if p.ndim == 2)
        else:
            products += int(math.prod(sizes))
    return 2 * products


def _width(attn: Any) -> int:
    fused = hasattr(attn, "qkv")
    projection = attn.qkv if fused else attn.q_proj
    rows = getattr(projection, "out_features", None)
    if rows is None:
        rows = projection.weight.shape[0]
    return int(rows) // (3 if fused else 1)


@dataclass
class TowerCost:
    """Work of one call of a vision tower.

    Attributes
    ----------
    before, after
        Sequence bounds of every block that has run, integer tensors, without and with the stage.
    tokens_before, tokens_after
        Number of rows that enter the projectors.
    """

    shape: TowerShape
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    tokens_before: int = 0
    tokens_after: int = 0

    def block(self, before: Tensor, after: Tensor) -> None:
        self.before.append(before)
        self.after.append(after)

    @property
    def patches(self) -> tuple[int, int]:
        """Rows summed over the blocks in use, without and with the stage."""
        before, after = (sum(int(b[-1]) for b in side) for side in (self.before, self.after))
        return before, after

    @property
    def tower_flops(self) -> tuple[int, int]:
        """FLOPs of all blocks without the stage, and of the blocks in use with it."""
        before = [self._block_flops(b) for b in self.before]
        skipped = before[-1] * self.shape.unused if before else 0
        return sum(before) + skipped, sum(map(self._block_flops, self.after))

    @property
    def projector_flops(self) -> tuple[int, int]:
        return self.shape.token * self.tokens_before, self.shape.token * self.tokens_after

    def _block_flops(self, bounds: Tensor) -> int:
        squares = int(bounds.long().diff().square().sum())
        return self.shape.row * int(bounds[-1]) + 4 * self.shape.width * squares
