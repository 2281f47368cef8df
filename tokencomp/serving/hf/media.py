"""Media of requests: from URLs to bytes and images, safe against hostile clients.

The server accepts `data:` URLs, and `file:` URLs below one directory that the operator names. It
never fetches from the network.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from tokencomp.errors import MediaError
from tokencomp.inputs.images import on_white
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.structure import check_jpeg

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FRAME_LIST = "video/jpeg"  # media type of a list of frames, as in vLLM


@dataclass(frozen=True)
class Limits:
    """Limits on the media of one request.

    Attributes
    ----------
    allowed_path
        Directory that `file:` URLs must lie below; None refuses all of them.
    max_bytes
        Largest size of one encoded image or video, in bytes.
    max_pixels
        Largest width × height of one image or frame.
    max_total_pixels
        Largest number of pixels in all images and frames of a request. It is limited in addition to
        `max_bytes`, because a few bytes can decode to very many pixels.
    frames
        Largest number of frames that are sampled from a video.
    policy
        How they are sampled, see `tokencomp.inputs.frames`; "" is `frames` evenly spaced ones.
    max_decoded
        Largest number of frames of a video.
    max_decoded_pixels, max_animated_pixels
        Largest number of pixels in all frames of a video, also in those that are not sampled,
        because a decoder has to produce every frame; and in those of an animation, in which a few
        bytes cost a whole canvas.
    decode_seconds
        Time in which all media of one request must be decoded.
    decode_memory
        Memory in bytes that the process which decodes a video file may take.
    max_items
        Largest number of images and videos per request.
    max_body, max_bodies
        Largest size of the body of a request, and of all bodies in memory, in bytes.
    body_seconds
        Time in which a client must send a body.
    """

    allowed_path: Path | None = None
    max_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    max_total_pixels: int = 300_000_000
    frames: int = 32
    policy: str = ""
    max_decoded: int = 36_000
    max_decoded_pixels: int = 20_000_000_000
    max_animated_pixels: int = 1_000_000_000
    decode_seconds: float = 60.0
    decode_memory: int = 3 << 30
    max_items: int = 32
    max_body: int = 128 << 20
    max_bodies: int = 512 << 20
    body_seconds: float = 120.0


def read_url(url: str, limits: Limits) -> tuple[str, bytes]:
    """Return media type and content of a `data:` URL or an allowed `file:` URL."""
    scheme, colon, _ = url[:10].partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "data":
        return _read_data(url, limits)
    if scheme == "file":
        return "", _read_file(url, limits)
    what = f"media URL scheme {scheme!r}" if scheme else "a media URL without a scheme"
    raise RequestError(
        f"{what}: this server fetches nothing. Send the content as a data: URL"
        + (", or a file: URL below its media path." if limits.allowed_path else ".")
    )


def _read_data(url: str, limits: Limits) -> tuple[str, bytes]:
    """Return media type and content of a `data:` URL; a list of frames stays base64 text."""
    head, comma, body = url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("a data: URL must look like data:image/png;base64,....")
    if len(body) * 3 // 4 > limits.max_bytes:
        raise _too_large(len(body) * 3 // 4, limits)
    media_type = head.partition(";")[0].lower()
    if media_type == FRAME_LIST:
        return media_type, body.encode("ascii", "replace")
    return media_type, decode_base64(body)


def decode_base64(text: str) -> bytes:
    """Decode base64 text."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"a data: URL is not valid base64 ({error}).") from None


def _read_file(url: str, limits: Limits) -> bytes:
    """Read a file below the allowed directory, after symbolic links are resolved."""
    if limits.allowed_path is None:
        raise RequestError("file: URLs are off (start the server with --allowed-media-path).")
    parts = urlsplit(url)
    root = limits.allowed_path.resolve()
    try:
        if parts.netloc not in ("", "localhost"):
            raise OSError("remote host")
        path = Path(unquote(parts.path)).resolve(strict=True)
        if not path.is_relative_to(root) or not path.is_file():
            raise OSError("outside")
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise _too_large(size, limits)
        return path.read_bytes()
    except RequestError:  # which is a ValueError too
        raise
    except (OSError, ValueError):
        # All causes have one message, so that clients cannot find out which files exist.
        raise RequestError("no such file below the server's media path.") from None


def _too_large(size: int, limits: Limits) -> RequestError:
    return RequestError(f"media of {size} bytes; the limit is {limits.max_bytes}.", 413)


def load_image(url: str, limits: Limits, deadline: Deadline | None = None) -> Image.Image:
    """Load one image as RGB, rotated upright as its EXIF data says.

    Transparent parts become white, as in vLLM.
    """
    deadline = deadline or Deadline(limits.decode_seconds)
    return decode_image(read_url(url, limits)[1], limits, deadline)


def check_image(content: bytes, limits: Limits, deadline: Deadline, count: int = 1) -> int:
    """Check an image without decoding its pixels; return how many it has.

    `count` images of its size must fit the limits together.
    """
    with _readable(limits):
        image = _open(content, limits, deadline, count)
        return int(image.width * image.height)


def decode_image(content: bytes, limits: Limits, deadline: Deadline, count: int = 1) -> Image.Image:
    """Decode an image as `load_image`; `count` images of its size must fit the limits together."""
    with _readable(limits):
        image = _open(content, limits, deadline, count)
        return on_white(ImageOps.exif_transpose(image), image.format)


def _open(content: bytes, limits: Limits, deadline: Deadline, count: int) -> Any:
    """Open an image and check its size, which its head says."""
    check_jpeg(content)
    image = Image.open(deadline.reader(content), formats=IMAGE_FORMATS)
    check_size(image.width, image.height, limits, count)
    return image


@contextlib.contextmanager
def _readable(limits: Limits) -> Iterator[None]:
    """Turn what Pillow raises in the block into a `RequestError`."""
    try:
        yield
    except RequestError:
        raise
    except MediaError as error:
        raise RequestError(str(error)) from None
    except Image.DecompressionBombError:
        raise RequestError(
            f"an image has more pixels than the limit of {limits.max_pixels}.", 413
        ) from None
    except UnidentifiedImageError:
        raise RequestError(
            f"an image cannot be read; allowed: {', '.join(IMAGE_FORMATS)}."
        ) from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise RequestError(
            f"an image is damaged ({type(error).__name__}). Send the whole file."
        ) from None


def check_size(width: int, height: int, limits: Limits, count: int = 1) -> None:
    """Refuse `count` images of this size, before they are decoded into memory."""
    if width * height > limits.max_pixels:
        raise RequestError(f"{width}×{height} pixels; the limit is {limits.max_pixels}.", 413)
    if width * height * count > limits.max_total_pixels:
        raise RequestError(
            f"{count} × {width}×{height} pixels; {limits.max_total_pixels} are left of what the "
            "media of one request may have in total. Send fewer or smaller media.",
            413,
        )
