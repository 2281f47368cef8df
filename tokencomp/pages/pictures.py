"""Pictures of kept patches: brightness is the share of decoder layers that see a patch.

Patches that the vision tower never saw have another shade.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from tokencomp.inputs.questions import frames_apart, modality_of
from tokencomp.storage import keeping, replace_file

if TYPE_CHECKING:
    from tokencomp.engine.stats import Stats
    from tokencomp.tokens.tokens import VisualSpan

DIM = 0.16
TINT = np.array([18.0, 22.0, 38.0])
UNSEEN = np.array([112.0, 30.0, 38.0])
NEVER = -1.0
"""The share of patches that left in the vision tower, before any layer."""
LINE = (70, 76, 96)
SIDE = 224
LARGE = 1280
"""Longer side up to which pictures of pages keep their size, so that text on them can be read."""
MAX_FRAMES = 8
MAX_MEDIA = 4


def survival(stats: Stats, layer: int | None = None) -> list[np.ndarray]:
    """Per span: the share of decoder layers that see each patch, float (t, h, w) in [0, 1].

    `NEVER` where the vision tower has dropped it. With a `layer`: 1 for what it sees, else 0.
    """
    layers = len(stats.layers)
    segments = list(itertools.pairwise([0, *stats.stage_layers, layers]))
    weights = [
        (stop - start) / layers if layer is None else float(start <= layer < stop)
        for start, stop in segments
    ]
    result = []
    for j, span in enumerate(stats.spans[0]):
        share = np.full(span.length, weights[0])  # layers before the first stage see everything
        for weight, kept in zip(weights[1:], stats.kept(0), strict=True):
            share[kept[j]] += weight
        unseen = np.ones(len(share), dtype=bool)
        unseen[stats.tower_kept(0)[j]] = False
        share[unseen] = NEVER
        result.append(share[~span.fixed_mask()].reshape(span.grid))
    return result


def overlay(image: Image.Image, share: np.ndarray, side: int = SIDE) -> Image.Image:
    """`image` with dropped patches dimmed; `share` is (h, w) in [0, 1], or `NEVER`."""
    pixels = np.asarray(_fit(image, side), dtype=np.float64)
    height, width, _ = pixels.shape
    rows = np.arange(height) * share.shape[0] // height
    columns = np.arange(width) * share.shape[1] // width
    spread = share[rows][:, columns, None]
    light = DIM + (1 - DIM) * np.maximum(spread, 0)
    tint = np.where(spread == NEVER, UNSEEN, TINT)
    out = Image.fromarray((pixels * light + tint * (1 - light)).round().astype(np.uint8))
    draw = ImageDraw.Draw(out)
    for k in range(1, share.shape[0]):
        y = k * height / share.shape[0]
        draw.line([(0, y), (width, y)], LINE)
    for k in range(1, share.shape[1]):
        x = k * width / share.shape[1]
        draw.line([(x, 0), (x, height)], LINE)
    return out


def strip(images: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures of equal size in rows of `columns`."""
    columns, gap = min(columns, len(images)), 6
    rows = -(-len(images) // columns)
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * (w + gap), k // columns * (h + gap)))
    return sheet


def frames_of(media: Any, t: int) -> tuple[list[Image.Image], list[int]]:
    """The pictures of a span, and the temporal position (0 to t - 1) of each.

    Several frames can share a position; the same patches of all of them are kept.
    """
    if modality_of(media) == "image":
        return [media] * t, [*range(t)]
    if len(media) < t:
        return [media[min(k * len(media) // t, len(media) - 1)] for k in range(t)], [*range(t)]
    per = -(-len(media) // t)
    return list(media), [k // per for k in range(len(media))]


def tiles(media: Any, shares: Sequence[np.ndarray], side: int = SIDE) -> list[Image.Image]:
    """The pictures of one image or video, of equal size; `strip` joins them to a sheet.

    A video is a list of frames. `shares` has one array (t, h, w) per span of this medium (a tile
    and a mosaic have two).
    """
    out = []
    for share in shares:
        frames, positions = frames_of(media, share.shape[0])
        out += [overlay(frames[k], share[positions[k]], side) for k in _shown(frames)]
    return of_one_size(out)


def plain_tiles(media: Any, side: int = SIDE) -> list[Image.Image]:
    """An image, or frames of a video, evenly spaced, without overlay."""
    frames = [media] if modality_of(media) == "image" else media
    return [_fit(frames[k], side) for k in _shown(frames)]


def of_one_size(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures, enlarged to the size of the largest."""
    size = max((p.size for p in pictures), key=lambda s: s[0] * s[1])
    return [p if p.size == size else p.resize(size) for p in pictures]


def _shown(frames: Sequence[Image.Image]) -> np.ndarray:
    """Indices of up to `MAX_FRAMES` frames, evenly spaced."""
    return np.unique(np.linspace(0, len(frames) - 1, MAX_FRAMES).round().astype(int))


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size)


def group_spans(spans: Sequence[VisualSpan], media: Sequence[Any]) -> list[list[int]]:
    """The spans of each medium, in order; excess spans belong to the last medium."""
    groups: list[list[int]] = [[] for _ in media]
    if len(spans) == len(media):
        return [[k] for k in range(len(media))]
    per = max(1, len(spans) // max(len(media), 1))
    for k in range(len(spans)):
        groups[min(k // per, len(media) - 1)].append(k)
    return groups


def save_picture(image: Image.Image, path: Path, **how: Any) -> None:
    """Write a JPEG to a run folder, atomically; `how` is for Pillow. Raises `OptionError`."""
    buffer = io.BytesIO()  # Pillow itself does not see that a file takes only a part
    image.save(buffer, "JPEG", **how)
    with keeping(path.parent):
        replace_file(path, lambda part: part.write_bytes(buffer.getvalue()))


def kept_picture(media: Sequence[Any], stats: Stats, side: int = SIDE) -> Image.Image:
    """What the layers saw of the first `MAX_MEDIA` of the first row of a batch, as one sheet."""
    sheets = [strip(shown) for _, shown in kept_tiles(media, stats, side=side)[:MAX_MEDIA]]
    return strip(of_one_size(sheets))


def kept_tiles(
    media: Sequence[Any], stats: Stats, layer: int | None = None, side: int = SIDE
) -> list[tuple[Any, list[Image.Image]]]:
    """Each medium of the first row of a batch, with `tiles` of its kept patches."""
    spans = stats.spans[0]
    if len(spans) > len(media) and all(span.modality == "image" for span in spans):
        media = frames_apart(media)  # the model takes frames of videos as images
    shares, groups = survival(stats, layer), group_spans(spans, media)
    return [
        (one, tiles(one, [shares[j] for j in group], side))
        for one, group in zip(media, groups, strict=True)
        if group
    ]


def data_uri(image: Image.Image) -> str:
    """The picture as a `data:` address for HTML."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
