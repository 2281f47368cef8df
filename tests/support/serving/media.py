"""Random images and videos, the same for every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

FPS = 1.0


def image(seed: int, width: int = 224, height: int = 224, changed: int = 0) -> Image.Image:
    """Return an image of blocks of 14 px in random colours, of which some have changed."""
    blocks = np.random.RandomState(seed).rand(max(height // 14, 1), max(width // 14, 1), 3)
    for i in range(changed):
        blocks[3 * i, 2 * i] = 1 - blocks[3 * i, 2 * i]
    return Image.fromarray((blocks * 255).astype("uint8")).resize((width, height), Image.NEAREST)


def video(seed: int, frames: int = 8, width: int = 112, height: int = 84) -> np.ndarray:
    """Return uint8 frames (frames, height, width, 3), each a random image."""
    return np.stack([np.asarray(image(seed * 1000 + i, width, height)) for i in range(frames)])


def metadata(frames: int) -> dict[str, Any]:
    """Return the metadata that a video loader reports for `frames` frames at `FPS`."""
    return {
        "fps": FPS,
        "total_num_frames": frames,
        "duration": frames / FPS,
        "frames_indices": list(range(frames)),
        "video_backend": "tests",
        "do_sample_frames": False,
    }


def media(descriptions: list[list[Any]]) -> dict[str, list[Any]]:
    """Return images and videos from `[["image", seed, w, h], ["video", seed, frames, w, h]]`."""
    result: dict[str, list[Any]] = {}
    for kind, *numbers in descriptions:
        result.setdefault(kind, []).append((image if kind == "image" else video)(*numbers))
    return result
