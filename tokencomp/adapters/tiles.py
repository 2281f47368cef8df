"""Towers that encode images as square tiles of equal size: InternVL, SmolVLM, Idefics3, LLaVA."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from tokencomp.adapters.base import Encoding, MediaCall, block_means, runs_of
from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.structural import StructuralAdapter
from tokencomp.adapters.towers.base import Tower, TowerCall
from tokencomp.adapters.towers.dense import DenseTower, squares
from tokencomp.errors import SpanError
from tokencomp.tokens.tokens import CODES, Modality


class TileAdapter(StructuralAdapter):
    """Every tile (crop, thumbnail, or frame) is a span; tokens between tiles are text.

    `ItemEnds` says which spans are one item. Subclasses define the tokens per side of a tile.
    """

    signals = (*StructuralAdapter.signals, "tower")
    layers_read_positions = False

    @property
    def feature_layer(self) -> int | list[int]:
        layer: int | list[int] = getattr(self.model.config, "vision_feature_layer", -1)
        return layer

    @property
    def class_token(self) -> bool:
        return getattr(self.model.config, "vision_feature_select_strategy", "full") == "default"

    def tile_patches(self, values: Tensor) -> Tensor:
        """(tiles, rows of the tower, d) → (tiles, patches, d)."""
        return values[:, 1:] if self.class_token else values

    def tower_tokens(self, values: Tensor, modality: str, call: TowerCall) -> Tensor:
        patches, side = self.tile_patches(values), self.patches_per_side
        grid = patches.unflatten(1, (side, side))
        return block_means(grid, side // self.tile_side).flatten(0, 2)

    def tower_layout(self) -> Tower:
        side = self.patches_per_side
        table = squares(side, side // self.tile_side)
        parts = self.tower, self.projector, table
        return DenseTower(*parts, layer=self.feature_layer, keys=self.tile_keys)

    def tile_keys(self, call: TowerCall, modalities: Tensor) -> list[tuple[Any, ...]]:
        """`Cells.keys` of the tiles of a call."""
        return []

    @property
    def projector(self) -> Any:
        """The module that projects the output of the tower to the size of text embeddings."""
        return self.body.multi_modal_projector

    @property
    def tile_side(self) -> int:
        """Tokens per side of a tile, after the projector."""
        return self.patches_per_side

    @property
    def patches_per_side(self) -> int:
        if self._patches is None:
            raise SpanError(
                f"{type(self.model).__name__}: image_size and patch_size of its vision_config give "
                "no square tiles, and no others are supported."
            )
        return self._patches

    def described(self, modality: Modality, call: MediaCall) -> Encoding:
        """All tiles have equally many tokens, so the source of features does not matter."""
        tile = self.tile_side**2
        return Encoding([tile] * (int((call.modalities == CODES[modality]).sum()) // tile))


@register_adapter
class InternVLAdapter(TileAdapter):
    """Tiles by aspect ratio, then a thumbnail, in one run; frames of a video are single tiles.

    The class token of the vision tower never reaches the decoder.
    """

    family = "InternVL"
    model_types = ("internvl",)

    def tile_keys(self, call: TowerCall, modalities: Tensor) -> list[tuple[Any, ...]]:
        """Number of tiles of the image, and of the tile: the model is told no other place."""
        runs = itertools.chain.from_iterable(runs_of(modalities))
        counts = [(stop - start) // self.tile_side**2 for start, stop, _ in runs]
        return [(count, number) for count in counts for number in range(count)]

    @property
    def tile_side(self) -> int:
        return round(self.patches_per_side * float(self.model.config.downsample_ratio))


@register_adapter
class SmolVLMAdapter(TileAdapter):
    """Pixel-shuffled tiles between row and column tokens; frames are single tiles."""

    family = "SmolVLM"
    model_types = ("smolvlm", "idefics3")

    def tile_keys(self, call: TowerCall, modalities: Tensor) -> list[tuple[Any, ...]]:
        """The token before the tile: its row and column, or that it is a whole image."""
        if call.ids is None:
            raise SpanError(
                f"{self.family} was called without input_ids, so it is not known which place of "
                "its image a tile shows. Pass input_ids, or take a reducer that looks at single "
                "pictures, such as 'pixelprune'."
            )
        rows = zip(runs_of(modalities), call.ids.tolist(), strict=True)
        return [(ids[start - 1],) for runs, ids in rows for start, _, _ in runs]

    @property
    def tower(self) -> Any:
        return self.body.vision_model

    @property
    def projector(self) -> Any:
        return self.body.connector

    @property
    def tile_side(self) -> int:
        return self.patches_per_side // int(self.model.config.scale_factor)
