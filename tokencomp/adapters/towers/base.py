"""Layout of a vision tower: its blocks, and the patches that each visual token reads.

The patches that one visual token reads are a *cell*. A *packed* tower
(`tokencomp.adapters.towers.packed`) takes the patches of all pictures as one sequence, with bounds.
A *dense* tower (`tokencomp.adapters.towers.dense`) takes a batch of pictures of equal size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tokencomp.errors import PlanError, UnsupportedModelError
from tokencomp.plan.plan import TowerStage
from tokencomp.tokens.signals import Signal
from tokencomp.tokens.tokens import Grid, Modality


@dataclass(eq=False)
class TowerCall:
    """One call of a vision tower: all images, or all videos, of a batch.

    `pixels` are the first argument of the tower: (patches, values) if packed, else
    (pictures, 3, H, W); `grids`, int64 (media, 3), the (t, h, w) in patches of packed towers.
    `modality` is "video" if the body's method that called the tower encodes videos, and `arguments`
    are those of the method by name, none if the tower was called directly. `packing` has tiles per
    image, and the other arguments of `Adapter.packer`, if it was called.

    `ids` and, if the stage compares pictures, `modalities` (int8) are those of the prompt, (B, L)
    each, and `cache` is its KV cache. A stage in the tower sets `cells`, `cost` (`TowerCost`), and,
    once it has chosen, `rows`, which its block and later ones see (`TowerRows`). The blocks set
    `values` by signal, float32 (pictures, rows, d); in packed towers all media are one picture.
    """

    pixels: Any
    grids: Any = None
    modality: Modality = "image"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    modalities: Tensor | None = None
    ids: Tensor | None = None
    cache: Any = None
    cells: Any = None
    cost: Any = None
    rows: Any = None
    values: dict[Signal, Tensor] = field(default_factory=dict)
    packing: tuple[list[int], tuple[Any, ...], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Cells:
    """The cells of one call of a vision tower.

    Attributes
    ----------
    pixels : Tensor, shape (patches, channels, frames, height, width)
        Pixels of every patch, in the order of the tower's input.
    members : Tensor of int64, shape (cells, m)
        Patches of every cell; -1: the cell has fewer than m.
    parts
        (t, h, w) in cells of every part that a reducer sees at once, in the order of `members`.
        Parts of one inner list share a budget.
    pictures
        Number of pictures of a dense tower; 0 if packed.
    rows
        Number of patches kept of every picture in a dense tower; 0: the pixels decide.
    order : Tensor of int64, shape (cells,), or None
        Cell at every position of a packed tower; None: cells are in order.
    keys
        Of every part: parts of equal keys show the same place of pictures of one size. Empty: the
        (h, w) of the part.
    tokens
        Tokens of every part in the prompt, with line breaks. Empty: one per cell.
    patches : Tensor of int64, shape (cells,), or None
        Number of every cell's token among those of the call, without line breaks; None: in order.
    """

    pixels: Tensor
    members: Tensor
    parts: list[list[Grid]]
    modality: Modality
    pictures: int = 0
    rows: int = 0
    order: Tensor | None = None
    keys: list[tuple[Any, ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    patches: Tensor | None = None


class Tower(ABC):
    """The layout of one model's vision tower.

    The model uses the output of `blocks`, in order; the `unused` blocks after them need not run.
    The output of `restorers` is restored to full length, with NaN in dropped rows; `projectors`
    convert patches to tokens, for the count of FLOPs. The family's usual processor divides pixels
    of 0 … 1 by `std`, per channel.
    """

    frames_apart = False
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __init__(
        self,
        module: Any,
        blocks: list[nn.Module],
        unused: list[nn.Module],
        restorers: list[nn.Module],
        projectors: list[nn.Module],
    ) -> None:
        self.module, self.blocks, self.unused = module, blocks, unused
        self.restorers, self.projectors = restorers, projectors

    @abstractmethod
    def cells(self, call: TowerCall, stage: TowerStage) -> Cells:
        """The cells of a call; raises `SpanError` if those of its pictures are unknown."""

    def fit(self, stage: TowerStage, family: str) -> TowerStage:
        """The stage in this tower; raises `PlanError` if block `stage.block` is not in use."""
        if stage.block >= len(self.blocks):
            raise PlanError(
                f"tower stage before block {stage.block}, but {family} uses the blocks 0 … "
                f"{len(self.blocks) - 1} of its vision tower. Move the stage."
            )
        return replace(stage, frames_apart=self.frames_apart)


def attention_blocks(tower: nn.Module) -> list[nn.Module]:
    """Self-attention modules of a tower, in order: those with `qkv`, or `q_proj` and `k_proj`."""
    return [
        m
        for m in tower.modules()
        if hasattr(m, "qkv") or (hasattr(m, "q_proj") and hasattr(m, "k_proj"))
    ]


def unknown_cells(family: str, reason: str = "") -> UnsupportedModelError:
    """The error for families whose visual tokens read unknown patches."""
    why = reason or "which patches of its vision tower a visual token reads is not known"
    return UnsupportedModelError(
        f"{family} has no tower stage, because {why}. Use tower_ratio=0, and a reducer that does "
        "not act before the tower (as delta and pixelprune do)."
    )
