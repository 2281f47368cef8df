"""Reading, padding and tiling of images for VILA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokencomp.errors import MediaError
from tokencomp.inputs.images import as_image, load_image
from tokencomp.inputs.media import load_media


def opened(item: Any, where: str) -> Image.Image:
    """Read an image from a path; for the others see `tokencomp.inputs.images.as_image`."""
    return load_image(item) if isinstance(item, (str, Path)) else as_image(item, where)


def as_frames(video: Any, where: str, limit: int) -> list[Image.Image]:
    """Return at most `limit` evenly spaced frames of a video, the first and the last included.

    A video is a path, a sequence of images, or a uint8 array (frames, H, W, 3). The message of a
    `MediaError` names it as `where`.
    """
    if isinstance(video, (str, Path)):
        video = load_media(video, limit)
        video = video if isinstance(video, list) else [video]
    frames = [opened(frame, f"{where}, frame {i}") for i, frame in enumerate(video)]
    if not frames:
        raise MediaError(f"{where}: no frames. A video needs at least one.")
    return [frames[i] for i in even(len(frames), limit)]


def even(total: int, limit: int) -> list[int]:
    """Return `limit` evenly spaced indices from 0 to total - 1, or all if there are fewer."""
    if total <= limit:
        return list(range(total))
    return [int(i) for i in np.round(np.linspace(0, total - 1, limit))]


def pad_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centre an image on a square canvas as large as its longer side."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def tile_grid(width: int, height: int, side: int, least: int, most: int) -> tuple[int, int]:
    """Return columns and rows of the grid whose aspect ratio is nearest to the image's.

    The grid has between `least` and `most` tiles of `side` × `side` pixels. Among equally near
    grids the smallest is chosen, unless the image has more than half of the pixels of a larger one.
    """
    grids = [
        (c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most
    ]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda g: g[0] * g[1]):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * side * side * columns * rows
        if distance < nearest or (distance == nearest and large):
            best, nearest = (columns, rows), distance
    return best


def tiles(image: Image.Image, side: int, least: int, most: int) -> list[Image.Image]:
    """Cut an image into square tiles in reading order.

    If there are several tiles, the whole image follows as a thumbnail of the same size.
    """
    columns, rows = tile_grid(*image.size, side, least, most)
    resized = image.resize((columns * side, rows * side))
    parts = [
        resized.crop((c * side, r * side, (c + 1) * side, (r + 1) * side))
        for r in range(rows)
        for c in range(columns)
    ]
    return parts if len(parts) == 1 else [*parts, image.resize((side, side))]
