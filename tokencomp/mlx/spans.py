"""Columns of images and videos in a prompt of mlx-vlm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from tokencomp.errors import SpanError

Grid = tuple[int, int, int]
MODALITIES = ("image", "video")


@dataclass(frozen=True)
class Span:
    """Tokens of one grid (t, h, w) of an "image" or "video".

    `columns` of the prompt, int64, ascend; the frames of a video may have text between them.
    `special`, bool, marks line breaks among them, which always stay. `item` is the same for all
    spans of one image or video.
    """

    modality: str
    grid: Grid
    columns: np.ndarray
    special: np.ndarray
    item: int

    @property
    def visual(self) -> int:
        """Number of its tokens, line breaks included."""
        return len(self.columns)


def find_spans(
    model: Any, ids: np.ndarray, embeds: mx.array, inputs: Mapping[str, Any]
) -> list[Span]:
    """Spans of a prompt of ids (L,), in its order; placeholders that no grid explains are refused.

    `embeds` (L, d) are its embeddings with features in place, and `inputs` its further arguments by
    name: pixels and grids.
    """
    spans: list[Span] = []
    for modality in MODALITIES:
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        grids = inputs.get(f"{modality}_grid_thw")
        if grids is None and inputs.get(name) is None:
            continue  # the id of a placeholder in a text is text
        columns = np.flatnonzero(ids == placeholder(model.config, modality))
        if grids is not None:
            spans += _by_grids(model, modality, columns, np.array(grids))
            continue
        for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
            spans += _tiles(model, modality, run, embeds) if len(run) else []
    return sorted(spans, key=lambda span: int(span.columns[0]))


def placeholder(config: Any, modality: str) -> int | None:
    """Id of the token that stands for features of images or videos; None: there is none."""
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return None


def _by_grids(model: Any, modality: str, columns: np.ndarray, grids: np.ndarray) -> list[Span]:
    """Spans of the Qwen families, whose grids are known, in patches."""
    side = model.config.vision_config.spatial_merge_size
    sizes = [(int(t), int(h) // side, int(w) // side) for t, h, w in grids]
    ends = np.cumsum([math.prod(size) for size in sizes])
    if not len(ends) or ends[-1] != len(columns):
        raise SpanError(
            f"{len(columns)} placeholders of {modality}s for grids of {sizes}: expected one for "
            "every token. Make the prompt with the processor of the model."
        )
    return [
        Span(modality, size, part, np.zeros(len(part), dtype=bool), item=int(part[0]))
        for size, part in zip(sizes, np.split(columns, ends[:-1]), strict=True)
    ]


def _tiles(model: Any, modality: str, run: np.ndarray, embeds: mx.array) -> list[Span]:
    """Spans of an image or video of LLaVA: tiles of a known side, and a mosaic with line breaks."""
    vision, n = model.config.vision_config, len(run)
    side = vision.image_size // vision.patch_size
    frame = (math.ceil(side / 2) if modality == "video" else side) ** 2
    newline = getattr(model, "image_newline", None)
    if newline is None:
        breaks = np.zeros(n, dtype=bool)
    else:
        rows = embeds[mx.array(run)]
        breaks = np.array((rows == newline.astype(rows.dtype)).all(1))
    count, at = int(breaks.sum()), np.flatnonzero(breaks)
    frames, rest = divmod(n, frame)
    item = int(run[0])
    base = Span(modality, (1, side, side), run[:frame], breaks[:frame], item)
    if (
        rest == count
        and not breaks[: frames * frame].any()
        and (frames == 1 or modality == "video")
    ):
        height = math.isqrt(frame)
        return [replace(base, grid=(frames, height, height), columns=run, special=breaks)]
    if modality == "image" and count and (n - frame) % count == 0:
        width = (n - frame) // count
        if np.array_equal(at, frame + width * np.arange(1, count + 1) - 1):
            grid = (1, count, width - 1)
            return [base, Span(modality, grid, run[frame:], breaks[frame:], item)]
    raise SpanError(
        f"Cannot split {n} {modality} tokens (from position {run[0]}) into {modality}s of {frame} "
        f"tokens{' per frame' if modality == 'video' else ''}. Put text between two {modality}s."
    )
