"""Media of requests: from URLs to pixels, with nothing a client could misuse.

Only `data:` URLs, and `file:` URLs below one directory that the operator names. Nothing is ever
fetched from the network. Containers are opened by their content, with demuxers that cannot refer
to other files.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps

from tokencomp.errors import MediaError
from tokencomp.inputs.media import frame_indices, to_rgb
from tokencomp.serving.hf.errors import RequestError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
CONTAINERS = {b"\x1aE\xdf\xa3": "matroska", b"RIFF": "avi", b"OggS": "ogg"}
FRAME_LIST = "video/jpeg"


@dataclass(frozen=True)
class Limits:
    """What one request may bring.

    Attributes
    ----------
    allowed_path
        Directory below which `file:` URLs may point; None refuses all of them.
    max_bytes
        Size of one encoded image or video.
    max_pixels
        Width × height of one image or frame.
    max_total_pixels
        Of all images and frames of a request: a few bytes can decode to very many.
    frames
        Frames taken from a video, evenly spaced.
    max_decoded
        Frames a video may have.
    max_items
        Images and videos per request.
    """

    allowed_path: Path | None = None
    max_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    max_total_pixels: int = 300_000_000
    frames: int = 32
    max_decoded: int = 36_000
    max_items: int = 32


def read_url(url: str, limits: Limits) -> tuple[str, bytes]:
    """Media type and content of a `data:` or allowed `file:` URL.

    Raises
    ------
    RequestError
        Another scheme, a path outside the allowed directory, or too much data.
    """
    scheme = url[:10].partition(":")[0].lower()
    if scheme == "data":
        return _read_data(url, limits)
    if scheme == "file":
        return "", _read_file(url, limits)
    raise RequestError(
        f"media URL scheme {scheme!r}: this server fetches nothing. Send the content as a data: "
        "URL" + (", or a file: URL below its media path." if limits.allowed_path else ".")
    )


def _read_data(url: str, limits: Limits) -> tuple[str, bytes]:
    head, comma, body = url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("a data: URL must look like data:image/png;base64,....")
    if len(body) * 3 // 4 > limits.max_bytes:
        raise _too_large(len(body) * 3 // 4, limits)
    media_type = head[: -len(";base64")].lower()
    if media_type == FRAME_LIST:
        return media_type, body.encode("ascii", "replace")
    return media_type, decode_base64(body)


def decode_base64(text: str) -> bytes:
    """Bytes of base64 text; raises `RequestError`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"a data: URL is not valid base64 ({error}).") from None


def _read_file(url: str, limits: Limits) -> bytes:
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
    except (OSError, ValueError):  # one message for all: do not tell what exists elsewhere
        raise RequestError("no such file below the server's media path.") from None


def _too_large(size: int, limits: Limits) -> RequestError:
    return RequestError(f"media of {size} bytes; the limit is {limits.max_bytes}.", 413)


def load_image(url: str, limits: Limits) -> Image.Image:
    """One RGB image, upright. Raises `RequestError`."""
    return _decode_image(read_url(url, limits)[1], limits)


def _decode_image(content: bytes, limits: Limits, count: int = 1) -> Image.Image:
    """An image that is one of `count` of its size."""
    try:
        image: Any = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        _check_size(image.width, image.height, limits, count)
        return to_rgb(ImageOps.exif_transpose(image), image.format)
    except RequestError:
        raise
    except MediaError as error:
        raise RequestError(str(error)) from None
    except Exception as error:  # Pillow raises many types for damaged files
        kind = type(error).__name__
        raise RequestError(
            f"an image cannot be read ({kind}); allowed: {', '.join(IMAGE_FORMATS)}."
        ) from None


def _check_size(width: int, height: int, limits: Limits, count: int = 1) -> None:
    """Refuse `count` pictures of this size, before they take memory."""
    if width * height > limits.max_pixels:
        raise RequestError(f"{width}×{height} pixels; the limit is {limits.max_pixels}.", 413)
    if width * height * count > limits.max_total_pixels:
        raise RequestError(
            f"{count} × {width}×{height} pixels; {limits.max_total_pixels} are left of what the "
            "media of one request may have. Send fewer or smaller media.",
            413,
        )


def load_video(url: str, limits: Limits) -> np.ndarray:
    """Evenly spaced frames, uint8 (frames, height, width, 3). Raises `RequestError`.

    Besides MP4, MOV, MKV, WebM, AVI and animated GIF or WebP: `data:video/jpeg;base64,A,B,C`, a
    list of JPEG (or PNG) frames chosen by the client, as vLLM accepts it.
    """
    media_type, content = read_url(url, limits)
    if media_type == FRAME_LIST:
        parts = content.decode("ascii").split(",")
        if len(parts) > limits.frames:
            raise RequestError(f"{len(parts)} frames; the limit is {limits.frames}.", 413)
        return _stack([_decode_image(decode_base64(p), limits, len(parts)) for p in parts])
    if content[:4] == b"GIF8" or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return _animation(content, limits)
    try:
        return _decode_video(content, _container(content), limits)
    except RequestError:
        raise
    except ImportError:
        raise RequestError("this server has no video decoder (pip install av).", 501) from None
    except Exception as error:  # decoders raise their own, undocumented types
        raise RequestError(f"a video cannot be decoded ({type(error).__name__}).") from None


def _container(content: bytes) -> str:
    if content[4:8] == b"ftyp":
        return "mov"
    found = CONTAINERS.get(content[:4])
    if found is None:
        raise RequestError("unknown video container; send MP4, MOV, MKV, WebM, AVI, OGG or GIF.")
    return found


def _decode_video(content: bytes, container: str, limits: Limits) -> np.ndarray:
    import av

    def frames(count: int = 1) -> Any:
        with av.open(io.BytesIO(content), "r", format=container) as opened:
            if not opened.streams.video:
                raise RequestError("the file has no video stream.")
            stream = opened.streams.video[0]
            _check_size(stream.width or 0, stream.height or 0, limits)
            for number, frame in enumerate(opened.decode(stream)):
                if number >= limits.max_decoded:
                    raise RequestError(f"more than {limits.max_decoded} frames.", 413)
                # the header need not tell the truth
                _check_size(frame.width, frame.height, limits, count)
                yield number, frame

    total = sum(1 for _ in frames())
    wanted = set(frame_indices(total, limits.frames))
    return _stack([frame.to_image() for number, frame in frames(len(wanted)) if number in wanted])


def _animation(content: bytes, limits: Limits) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(content), formats=("GIF", "WEBP"))
        _check_size(image.width, image.height, limits)
        total = getattr(image, "n_frames", 1)
        if total > limits.max_decoded:
            raise RequestError(f"more than {limits.max_decoded} frames.", 413)
        wanted = frame_indices(total, limits.frames)
        _check_size(image.width, image.height, limits, len(wanted))
        frames = []
        for index in wanted:
            image.seek(index)
            frames.append(image.convert("RGB"))
        return _stack(frames)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise RequestError(f"an animation cannot be read ({type(error).__name__}).") from None


def _stack(frames: list[Image.Image]) -> np.ndarray:
    if not frames:
        raise RequestError("a video has no frames.")
    if len({frame.size for frame in frames}) > 1:
        raise RequestError("frames of one video differ in size.")
    return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
