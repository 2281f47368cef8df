"""Media of requests: from URLs to pixels, safe against hostile clients.

The server accepts `data:` URLs, and `file:` URLs below one directory that the operator names. It
never fetches from the network. The content of a container decides which demuxer opens it, and only
demuxers that cannot refer to other files are used.
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
        Number of evenly spaced frames that are sampled from a video.
    max_decoded
        Largest number of frames of a video.
    max_items
        Largest number of images and videos per request.
    """

    allowed_path: Path | None = None
    max_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    max_total_pixels: int = 300_000_000
    frames: int = 32
    max_decoded: int = 36_000
    max_items: int = 32


def read_url(url: str, limits: Limits) -> tuple[str, bytes]:
    """Return media type and content of a `data:` URL or an allowed `file:` URL.

    Raises
    ------
    RequestError
        If the scheme is another one, the path is outside the allowed directory, or the content is
        too large.
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
    """Return media type and content of a `data:` URL; a list of frames stays base64 text."""
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
    """Decode base64 text.

    Raises
    ------
    RequestError
        If the text is not valid base64.
    """
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
    except (
        OSError,
        ValueError,
    ):  # one message for all causes, so that clients cannot probe for files
        raise RequestError("no such file below the server's media path.") from None


def _too_large(size: int, limits: Limits) -> RequestError:
    return RequestError(f"media of {size} bytes; the limit is {limits.max_bytes}.", 413)


def load_image(url: str, limits: Limits) -> Image.Image:
    """Load one image as RGB, rotated upright as its EXIF data says.

    Raises
    ------
    RequestError
        If the image cannot be read or exceeds a limit.
    """
    return _decode_image(read_url(url, limits)[1], limits)


def _decode_image(content: bytes, limits: Limits, count: int = 1) -> Image.Image:
    """Decode an image; `count` images of its size must fit the limits together."""
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
    """Refuse `count` images of this size, before they are decoded into memory."""
    if width * height > limits.max_pixels:
        raise RequestError(f"{width}×{height} pixels; the limit is {limits.max_pixels}.", 413)
    if width * height * count > limits.max_total_pixels:
        raise RequestError(
            f"{count} × {width}×{height} pixels; {limits.max_total_pixels} are left of what the "
            "media of one request may have in total. Send fewer or smaller media.",
            413,
        )


def load_video(url: str, limits: Limits) -> np.ndarray:
    """Load evenly spaced frames of a video as uint8 (frames, height, width, 3).

    The format is MP4, MOV, MKV, WebM, AVI, OGG or an animated GIF or WebP. As in vLLM,
    `data:video/jpeg;base64,A,B,C` is a list of JPEG (or PNG) frames that the client has sampled.

    Raises
    ------
    RequestError
        If the video cannot be decoded or exceeds a limit, or no video decoder is installed.
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
    except Exception as error:  # decoders raise undocumented types
        raise RequestError(f"a video cannot be decoded ({type(error).__name__}).") from None


def _container(content: bytes) -> str:
    """Return the demuxer for a file by its first bytes."""
    if content[4:8] == b"ftyp":
        return "mov"
    container = CONTAINERS.get(content[:4])
    if container is None:
        raise RequestError("unknown video container; send MP4, MOV, MKV, WebM, AVI, OGG or GIF.")
    return container


def _decode_video(content: bytes, container: str, limits: Limits) -> np.ndarray:
    """Decode a video twice: to count its frames, and to collect those that are sampled.

    Headers often lack the number of frames, and collecting all frames would take too much memory.
    """
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
                # The size in the header may be wrong, so every frame is checked.
                _check_size(frame.width, frame.height, limits, count)
                yield number, frame

    total = sum(1 for _ in frames())
    selected = set(frame_indices(total, limits.frames))
    return _stack(
        [frame.to_image() for number, frame in frames(len(selected)) if number in selected]
    )


def _animation(content: bytes, limits: Limits) -> np.ndarray:
    """Decode the sampled frames of an animated GIF or WebP."""
    try:
        image = Image.open(io.BytesIO(content), formats=("GIF", "WEBP"))
        _check_size(image.width, image.height, limits)
        total = getattr(image, "n_frames", 1)
        if total > limits.max_decoded:
            raise RequestError(f"more than {limits.max_decoded} frames.", 413)
        selected = frame_indices(total, limits.frames)
        _check_size(image.width, image.height, limits, len(selected))
        frames = []
        for index in selected:
            image.seek(index)
            frames.append(image.convert("RGB"))
        return _stack(frames)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise RequestError(f"an animation cannot be read ({type(error).__name__}).") from None


def _stack(frames: list[Image.Image]) -> np.ndarray:
    """Stack frames of one size to uint8 (frames, height, width, 3)."""
    if not frames:
        raise RequestError("a video has no frames.")
    if len({frame.size for frame in frames}) > 1:
        raise RequestError("frames of one video differ in size.")
    return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
