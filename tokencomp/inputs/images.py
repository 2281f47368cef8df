"""Reading images, with errors that say what is wrong with the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tokencomp.errors import MediaError, MissingDependencyError, install

try:
    from PIL import Image as Image
    from PIL import ImageOps
except ModuleNotFoundError:
    raise MissingDependencyError(f"reading images needs Pillow: {install('media')}.") from None

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot open."""


def load_image(path: str | Path) -> Image.Image:
    """Read one image as RGB, upright (EXIF orientation applied), transparent parts on white.

    Raises `MediaError`.
    """
    try:
        with Image.open(path) as image:
            return on_white(ImageOps.exif_transpose(image), image.format)
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from None
    except UNREADABLE as error:
        raise MediaError(
            f"{path}: the image is damaged, too large, or of a format that Pillow does not read "
            f"({error}). Convert it to PNG or JPEG, or a video to MP4."
        ) from error


def on_white(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """The picture as `to_rgb`, on white if it has transparent parts."""
    image.load()  # frames of animations say only then what is transparent
    transparent = "A" in image.getbands() or "transparency" in image.info
    if not transparent or image.mode.startswith("I"):
        return to_rgb(image, file_format)
    rgba = image.convert("RGBA")
    result = Image.new("RGB", image.size, "white")
    result.paste(rgba, mask=rgba.getchannel("A"))
    return result


def to_rgb(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """An RGB picture of 8 bits per channel; 16-bit grey pictures are scaled, not clipped.

    By `file_format`, Pillow's name: in PNG and PPM, 32-bit values are 16-bit ones; in others,
    values up to 255 are 8-bit ones.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high >= 1 << 16:
        raise MediaError(
            f"a picture of 32-bit numbers (mode {image.mode}, {low:g} to {high:g}), of unknown "
            "range. Save it with 8 or 16 bits per channel."
        )
    deep = image.mode != "I" or high > 255 or file_format in ("PNG", "PPM")
    return Image.fromarray((values // (257 if deep else 1)).astype(np.uint8)).convert("RGB")


def as_image(item: Any, where: str) -> Image.Image:
    """A PIL image or a uint8 array (height, width, 3) as an RGB image."""
    if isinstance(item, np.ndarray) and item.ndim == 3 and item.dtype == np.uint8:
        item = Image.fromarray(item)
    if isinstance(item, Image.Image):
        return to_rgb(item)
    form = f" {item.shape} of {item.dtype}" if isinstance(item, np.ndarray) else ""
    raise MediaError(
        f"{where}: a {type(item).__name__}{form}; allowed: a PIL image, a uint8 array (height, "
        "width, 3), or a list of such frames. Files: tokencomp.inputs.media.load_media(path)."
    )


def seconds_shown(image: Image.Image) -> float:
    """The duration of the frame of an animation that `image.seek` has gone to."""
    if image.format == "WEBP":
        image.load()  # sets the duration of the frame
    return float(image.info.get("duration", 0)) / 1000
