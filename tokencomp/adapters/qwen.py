"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: towers, and grids from M-RoPE positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.structural import StructuralAdapter
from tokencomp.adapters.towers.base import TowerCall
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.tokens.tokens import Grid
from tokencomp.torchlib import compat

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@register_adapter
class Qwen2VLAdapter(StructuralAdapter):
    """The tower packs the patches of all media into one sequence."""

    family = "Qwen2-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    signals = (*StructuralAdapter.signals, "tower")
    mrope = True
    needs_positions = True
    layers_read_positions = False
    pixel_std: ClassVar[tuple[float, float, float]] = CLIP_STD

    @property
    def tower(self) -> Any:
        return self.body.visual

    def tower_tokens(self, values: Tensor, modality: str, call: TowerCall) -> Tensor:
        unit = self.model.config.vision_config.spatial_merge_size**2
        cells: Tensor = values[0].unflatten(0, (-1, unit))
        return cells.mean(1)

    def tower_layout(self) -> PackedTower:
        size = self.model.config.vision_config.patch_size
        return PackedTower(self.tower, size, std=self.pixel_std)

    def modalities_in_place(self, inputs: Mapping[str, Any]) -> Tensor | None:
        modalities, positions = super().modalities_in_place(inputs), inputs.get("position_ids")
        if modalities is not None or inputs.get("inputs_embeds") is None or positions is None:
            return modalities
        grids = {modality: self._token_grids(inputs, modality) for modality in ("image", "video")}
        return modalities_from_grids(positions.cpu(), grids) if positions.ndim == 3 else None

    def _token_grids(self, inputs: Mapping[str, Any], modality: str) -> list[Grid]:
        """Grids (t, h, w) in tokens of all images or videos of a batch, in order."""
        grids = inputs.get(f"{modality}_grid_thw")
        side = self.model.config.vision_config.spatial_merge_size
        rows = [] if grids is None else grids.tolist()
        return [(t, h // side, w // side) for t, h, w in rows]


def modalities_from_grids(positions: Tensor, grids: dict[str, list[Grid]]) -> Tensor | None:
    """Columns of media with known grids, found by their M-RoPE positions.

    The last three rows of `positions`, int64 (3 or 4, B, L) on the CPU, are time, height and width;
    `grids` are by modality, in tokens and in the order of the batch. Returns int8 (B, L): 0 text,
    1 image, 2 video; None if there is no grid, or one matches nowhere.
    """
    pending = {modality: list(rows) for modality, rows in grids.items() if rows}
    if not pending:
        return None
    modalities = torch.zeros(positions.shape[1:], dtype=torch.int8)
    for b in range(modalities.shape[0]):
        cursor = 0
        while True:
            starts = {k: _raster_start(positions[-3:, b], cursor, g[0]) for k, g in pending.items()}
            starts = {modality: start for modality, start in starts.items() if start >= 0}
            if not starts:
                break
            modality = min(starts, key=starts.__getitem__)
            cursor = starts[modality] + math.prod(pending[modality].pop(0))
            modalities[b, starts[modality] : cursor] = 1 if modality == "image" else 2
            pending = {k: g for k, g in pending.items() if g}
    return None if pending else modalities


def _raster_start(positions: Tensor, cursor: int, grid: Grid) -> int:
    """First column from `cursor` on where positions (3, L) run through `grid`, or -1.

    A single token has the positions of text, so a grid of one token never matches.
    """
    count, (_, rows, cols) = math.prod(grid), grid
    if count == 1 or cursor + count > positions.shape[1]:
        return -1
    windows = positions[:, cursor:].unfold(1, count, 1)
    windows = windows - windows[..., :1]
    raster = torch.arange(count)
    match = (windows[1] == raster // cols % rows).all(1) & (windows[2] == raster % cols).all(1)
    frames = windows[0].unflatten(1, (-1, rows * cols))
    match &= (frames == frames[..., :1]).all(-1).all(-1)
    starts = match.nonzero()[:, 0]
    return cursor + int(starts[0]) if starts.numel() else -1


@register_adapter
class Qwen25VLAdapter(Qwen2VLAdapter):
    """Temporal positions are scaled by seconds; the tower permutes windows up to its merger."""

    family = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)

    def tower_layout(self) -> PackedTower:
        order = functools.partial(compat.window_order, self.tower)
        size = self.model.config.vision_config.patch_size
        return PackedTower(self.tower, size, order, self.pixel_std)

    def tower_tokens(self, values: Tensor, modality: str, call: TowerCall) -> Tensor:
        order = compat.window_order(self.tower, call.grids).to(values.device)
        return super().tower_tokens(values, modality, call)[order.argsort()]


@register_adapter
class Qwen3VLAdapter(Qwen2VLAdapter):
    """A video is one span of all its frames; the timestamps between them are text.

    Features of intermediate vision layers ("deepstack", arXiv 2406.04334) are added to the hidden
    states of visual tokens after each of the first decoder layers, so they are gathered with the
    tokens at entry, and tokens can be dropped between layers only after the last addition.
    """

    family = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    pixel_std = (0.5, 0.5, 0.5)

    def _token_grids(self, inputs: Mapping[str, Any], modality: str) -> list[Grid]:
        grids = super()._token_grids(inputs, modality)
        return [(1, h, w) for t, h, w in grids for _ in range(t)]  # text separates frames
