"""Media of a batch: their features in the embeddings, and their pixels for more samples."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tokencomp.errors import SpanError


def expanded(
    media: dict[str, Tensor], ids: Tensor, times: int, config: Any, per_image: int
) -> dict[str, Tensor]:
    """Repeat media per sample, whose number of images and frames follows from its tokens."""
    t, h, w = config.video_pool
    frames = (ids == config.video_token_id).sum(1) * (t * h * w) // per_image
    out = {}
    if "pixel_values" in media:
        images = (ids == config.image_token_id).sum(1) // per_image
        out["pixel_values"] = _repeat(media["pixel_values"], images.tolist(), times)
    if "pixel_values_videos" in media:
        pixels = media["pixel_values_videos"]
        out["pixel_values_videos"] = _repeat(pixels, frames.tolist(), times)
    if "video_frames" in media:
        ends, videos = frames.cumsum(0).tolist(), media["video_frames"].cumsum(0).tolist()
        bounds = itertools.pairwise([0, *ends])
        counts = [sum(low < v <= high for v in videos) for low, high in bounds]
        out["video_frames"] = _repeat(media["video_frames"], counts, times)
    return out


def _repeat(x: Tensor, counts: list[int], times: int) -> Tensor:
    """Split `x` into groups of `counts` rows and repeat each group as a whole."""
    return torch.cat([part for group in x.split(counts) for part in [group] * times])


def splice(embeds: Tensor, where: Tensor, features: Tensor, kind: str) -> Tensor:
    """Write features (N, hidden_size) to the N positions of the mask `where` (B, L)."""
    if int(where.sum()) != len(features):
        raise SpanError(
            f"{int(where.sum())} {kind} placeholders for {len(features)} {kind} features. Create "
            "input_ids and pixels of a prompt with one call of VilaProcessor."
        )
    return embeds.masked_scatter(where[..., None].to(embeds.device), features.to(embeds))
