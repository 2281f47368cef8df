"""LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import ENCODED, Adapter, MediaCall, Run
from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.tiles import TileAdapter
from tokencomp.adapters.towers.base import TowerCall
from tokencomp.adapters.towers.dense import DenseTower, bilinear, squares
from tokencomp.adapters.towers.mosaic import MosaicTower
from tokencomp.errors import SpanError
from tokencomp.tokens.tokens import VisualSpan


def _tower(adapter: TileAdapter, kind: type[DenseTower], **options: Any) -> DenseTower:
    """A tower whose patches are the image tokens, each projected independently."""
    projector, layer = adapter.projector, adapter.feature_layer
    options = {"restorer": projector, "layer": layer, **options}
    return kind(adapter.tower, projector, squares(adapter.patches_per_side, 1), **options)


@register_adapter
class LlavaAdapter(TileAdapter):
    """One square tile per image, class token removed."""

    family = "LLaVA-1.5"
    model_types = ("llava",)

    def tower_layout(self) -> DenseTower:
        return _tower(self, DenseTower)


@register_adapter
class LlavaNextAdapter(TileAdapter):
    """An image is a base tile, then rows of the unpadded mosaic, each ended by `image_newline`.

    Base tile and mosaic become two spans; the line breaks are special tokens of the mosaic.
    """

    family = "LLaVA-NeXT"
    model_types = ("llava_next",)
    packer = "pack_image_features"
    spans = Adapter.spans  # by `row_spans`: token counts do not give the parts of a medium

    def tower_layout(self) -> DenseTower:
        return _tower(self, MosaicTower, body=self.body)

    def tower_tokens(self, values: Tensor, modality: str, call: TowerCall) -> Tensor:
        patches = self.tile_patches(values)
        if modality == "video":
            return self._pooled(patches).flatten(0, 1)
        if call.packing is None:
            return patches.flatten(0, 1)
        tiles, args, kwargs = call.packing
        pack = type(self.body).pack_image_features
        packed = pack(self.body, patches.split(tiles), *args, image_newline=None, **kwargs)[0]
        return packed if isinstance(packed, Tensor) else torch.cat(list(packed))

    def _pooled(self, patches: Tensor) -> Tensor:
        """Frames (n, patches, d) → (n, tokens, d)."""
        return patches

    def row_spans(self, call: MediaCall, row: int, runs: list[Run]) -> list[VisualSpan]:
        spans: list[VisualSpan] = []
        for start, stop, modality in runs:
            if modality == "video":
                spans += self._video(start, stop, row, call)
            else:
                newline = _packed(self.body.image_newline).to(call.embeds)
                breaks = call.embeds[row, start:stop].eq(newline).all(-1).nonzero()[:, 0]
                spans += self._images(start, stop, row, [start + int(b) for b in breaks.tolist()])
        return spans

    def _video(self, start: int, stop: int, row: int, call: MediaCall) -> list[VisualSpan]:
        """Cut a run of video tokens, in families that take videos."""
        raise NotImplementedError

    def _images(self, start: int, stop: int, row: int, breaks: list[int]) -> list[VisualSpan]:
        """Cut a run of one or more images at line breaks.

        Very thin images have a mosaic without patches: only line breaks, or nothing.
        """
        side, spans, cursor, i = self.tile_side, [], start, 0
        tile = side * side
        while cursor < stop:
            first = cursor + tile
            width = (breaks[i] if i < len(breaks) else stop) - first
            if width < 0 or (0 < width < tile and i == len(breaks)):
                raise SpanError(
                    f"image tokens {start} … {stop - 1} of sample {row}: expected a base tile of "
                    f"{side}×{side} tokens followed by rows that end in the image_newline "
                    "embedding."
                )
            if width == 0 or width >= tile:  # wider than any mosaic: the next image begins
                empty = 0
                while i < len(breaks) and breaks[i] == first + empty:
                    empty, i = empty + 1, i + 1
                special = tuple(range(tile, tile + empty))
                spans.append(VisualSpan(cursor, tile + empty, (1, side, side), special=special))
                cursor = first + empty
                continue
            rows, i = 1, i + 1
            while i < len(breaks) and breaks[i] - breaks[i - 1] == width + 1:
                rows, i = rows + 1, i + 1
            special = tuple((width + 1) * r + width for r in range(rows))
            spans.append(VisualSpan(cursor, tile, (1, side, side), item=cursor))
            mosaic, grid = rows * (width + 1), (1, rows, width)
            spans.append(VisualSpan(first, mosaic, grid, special=special, item=cursor, tile=1))
            cursor = first + rows * (width + 1)
        return spans


def _packed(newline: Tensor) -> Tensor:
    """The line break in the dtype of the features that it is concatenated with (autocast)."""
    device = newline.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return newline.to(torch.get_autocast_dtype(device))
    return newline


@register_adapter
class LlavaNextVideoAdapter(LlavaNextAdapter):
    """Videos are concatenated pooled frames, without line breaks."""

    family = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)

    def tower_layout(self) -> DenseTower:
        # Frames are pooled before the projector, so the output of the tower is restored first.
        size = self.model.config.spatial_pool_stride
        video = squares(self.patches_per_side, size, partial=False)
        return _tower(
            self,
            MosaicTower,
            body=self.body,
            video=video,
            restorer=self.tower,
            projects_tokens=True,
        )

    def _pooled(self, patches: Tensor) -> Tensor:
        pooled: Tensor = self.body.vision_resampler(patches)
        return pooled

    def _video(self, start: int, stop: int, row: int, call: MediaCall) -> list[VisualSpan]:
        """Cut a run of adjacent videos; if their length is unknown, it is one video."""
        side = self.tile_side // self.model.config.spatial_pool_stride
        frame = side * side
        length = _video_length(call, frame) or stop - start
        if length % frame or (stop - start) % length:
            raise SpanError(
                f"video tokens {start} … {stop - 1} of sample {row}: no whole number of videos of "
                f"{length} tokens (frames of {side}×{side})."
            )
        grid = (length // frame, side, side)
        return [VisualSpan(s, length, grid, "video") for s in range(start, stop, length)]


def _video_length(call: MediaCall, frame: int) -> int:
    """Tokens of each video of the batch, whose frames all have `frame` tokens."""
    pixels: Tensor | None = call.inputs.get("pixel_values_videos")
    if pixels is not None:
        return pixels.shape[1] * frame
    encoded = (call.inputs.get(ENCODED) or {}).get("video")
    return 0 if encoded is None else encoded.pooler_output[0].numel() // call.embeds.shape[-1]


@register_adapter
class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Images as in LLaVA-NeXT; a video is one span of pooled frames that ends in one line break."""

    family = "LLaVA-OneVision"
    model_types = ("llava_onevision",)

    def tower_layout(self) -> DenseTower:
        side = self.patches_per_side
        video = bilinear(side, math.ceil(side / 2))
        return _tower(self, MosaicTower, body=self.body, video=video, ends=1)

    def _pooled(self, patches: Tensor) -> Tensor:
        pooled: Tensor = self.body.apply_pooling(patches)
        return pooled

    def _video(self, start: int, stop: int, row: int, call: MediaCall) -> list[VisualSpan]:
        """Cut a run of adjacent videos; if their length is unknown, it is one video."""
        side = math.ceil(self.tile_side / 2)
        frame = side * side
        known = _video_length(call, frame) // frame * frame  # with or without the line break
        length = known + 1 if known else stop - start
        if length % frame != 1 or (stop - start) % length:
            raise SpanError(
                f"video tokens {start} … {stop - 1} of sample {row}: expected frames of {side}×"
                f"{side} tokens and one line break. Put text between videos whose pixels the call "
                "does not bring."
            )
        grid = (length // frame, side, side)
        return [
            VisualSpan(first, length, grid, "video", special=(length - 1,))
            for first in range(start, stop, length)
        ]
