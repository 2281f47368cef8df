"""Models whose images are square tiles of equal size: LLaVA-1.5, InternVL, SmolVLM, Idefics3."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tokencomp.adapters.base import Adapter, block_means
from tokencomp.adapters.call import Call, TowerCall
from tokencomp.adapters.structure import square_side
from tokencomp.adapters.towers.base import Tower
from tokencomp.adapters.towers.dense import DenseTower
from tokencomp.adapters.towers.tables import squares
from tokencomp.errors import SpanError
from tokencomp.tokens.spans import VisualSpan


class TileAdapter(Adapter):
    """Every tile (crop, thumbnail, or frame) is a span; tokens between tiles are text.

    Subclasses say how many tokens a tile has on each side.
    """

    signals = (*Adapter.signals, "tower")

    @property
    def class_token(self) -> bool:
        return getattr(self.model.config, "vision_feature_select_strategy", "full") == "default"

    def tile_patches(self, values: Tensor) -> Tensor:
        """(tiles, rows of the tower, d) → (tiles, patches, d)."""
        return values[:, 1:] if self.class_token else values

    def tower_tokens(self, values: Tensor, kind: str, call: TowerCall) -> Tensor:
        patches, side = self.tile_patches(values), self.patches_per_side
        grid = patches.unflatten(1, (side, side))
        return block_means(grid, side // self.tile_side).flatten(0, 2)

    def tower_layout(self) -> Tower:
        side = self.patches_per_side
        table = squares(side, side // self.tile_side)
        layer = getattr(self.model.config, "vision_feature_layer", -1)
        return DenseTower(self.tower, self.projector, table, layer=layer, owner=self.body)

    @property
    def projector(self) -> Any:
        """The module that maps what the tower returns to the size of text embeddings."""
        return self.body.multi_modal_projector

    @property
    def tile_side(self) -> int:
        """Tokens per side of a tile, after the projector."""
        return self.patches_per_side

    @property
    def patches_per_side(self) -> int:
        """Patches per side of the vision tower's input."""
        vision = self.model.config.vision_config
        image, patch = (_side(vision, name) for name in ("image_size", "patch_size"))
        return image // patch

    def row_spans(self, call: Call, row: int) -> list[VisualSpan]:
        side, spans = self.tile_side, []
        for start, stop, kind in call.runs(row):
            tiles, rest = divmod(stop - start, side * side)
            if rest:
                raise SpanError(
                    f"image tokens {start} … {stop - 1} of sample {row}: {stop - start} tokens are "
                    f"no whole number of {side}×{side} tiles. {self.family} is supported with the "
                    "fixed tile size of its vision config."
                )
            spans += [
                VisualSpan(start + i * side * side, side * side, (1, side, side), kind, item=start)
                for i in range(tiles)
            ]
        return spans


def _side(config: object, name: str) -> int:
    """A size in a vision config, of which height and width must be equal."""
    value = getattr(config, name)
    side = square_side(value)
    if side is None:
        raise SpanError(f"{name}={value!r}: only square tiles are supported.")
    return side


def shrunk(side: int, factor: float) -> int:
    """Side of a grid after pixel shuffle by `factor`."""
    return math.floor(side * factor + 1e-6)
