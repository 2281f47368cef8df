"""Media of requests: from URLs to bytes and images, safe against malicious clients.

Servers accept `data:` URLs, and `file:` URLs below one directory. They download nothing.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from tokencomp.errors import MediaError
from tokencomp.inputs.images import on_white
from tokencomp.serving.limits import Deadline, Limits, RequestError, TimedReader

if TYPE_CHECKING:
    from tokencomp.serving.request import Part

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FRAME_LIST = "video/jpeg"  # media type of a list of frames, as in vLLM

MAX_SCANS = 100  # of a progressive JPEG; each passes over all pixels; usual: 10
MAX_SEGMENTS = 1000  # of a JPEG, which Pillow stores one by one; usual: 10, with profiles 200
# A segment of a JPEG. In compressed data, the byte 0xFF is followed by 0 or by a restart marker.
SEGMENT = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
START_OF_FILE, END, SCAN = 0xD8, 0xD9, 0xDA
# Blocks of a GIF, and sizes of its header and of the descriptor of an image.
EXTENSION, IMAGE, TRAILER = 0x21, 0x2C, 0x3B
HEADER, DESCRIPTOR = 13, 9


# -- all media of a request ------------------------------------------------------------------------


def check_media(
    media: Sequence[Part], limits: Limits, deadline: Deadline, remote: bool = False
) -> tuple[int, int]:
    """Check media without decoding pixels; all of a request share one limit of pixels.

    Returns the pixels that images and lists of frames leave, and the number of video files, which
    share them. With `remote`, media of other hosts, which are not read here, may be there too.
    """
    left, files = limits.max_total_pixels, 0
    for part in media:
        pixels = None
        # Media of other hosts are fetched by vLLM, if its operator allows hosts.
        if not (remote and part.medium.url[:4].lower() == "http"):
            allowed = replace(limits, max_total_pixels=left)
            pixels = _pixels(part.kind, part.medium.url, allowed, deadline)
        files += part.kind == "video" and pixels is None
        left -= pixels or 0
    return left, files


def _pixels(kind: str, url: str, limits: Limits, deadline: Deadline) -> int | None:
    """Check an image or a list of frames; return its pixels, or None of a video file."""
    media_type, content = read_url(url, limits)
    if kind == "image":
        return check_image(content, limits, deadline)
    if media_type != FRAME_LIST:
        return None
    frames = frame_list(content, limits)
    return sum(check_image(frame, limits, deadline, len(frames)) for frame in frames)


def frame_list(content: bytes, limits: Limits) -> list[bytes]:
    """Pictures of a list of frames in base64."""
    parts = content.split(b",")
    if len(parts) > limits.frames:
        raise RequestError(f"{len(parts)} frames; the limit is {limits.frames}.", 413)
    return [decode_base64(part) for part in parts]


# -- URLs ------------------------------------------------------------------------------------------


def read_url(url: str, limits: Limits) -> tuple[str, bytes]:
    """Media type and content of a URL that is allowed; a list of frames remains base64 text."""
    # The scheme is in the first characters: the rest can have megabytes.
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
    head, comma, body = url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("a data: URL must look like data:image/png;base64,....")
    # Four characters are three bytes: refuse before they are decoded.
    _check_bytes(len(body) * 3 // 4, limits)
    media_type = head.partition(";")[0].lower()  # without its parameters
    if media_type == FRAME_LIST:
        return media_type, body.encode("ascii", "replace")
    return media_type, decode_base64(body)


def decode_base64(text: str | bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"a data: URL is not valid base64 ({error}).") from None


def _read_file(url: str, limits: Limits) -> bytes:
    """Read a file below the allowed directory, after symbolic links are resolved."""
    if limits.allowed_path is None:
        raise RequestError("file: URLs are off (start the server with --allowed-media-path).")
    parts = urlsplit(url)
    try:
        if parts.netloc not in ("", "localhost"):
            raise OSError("remote host")
        # After symbolic links and "..", which could lead out of the directory.
        path = Path(unquote(parts.path)).resolve(strict=True)
        if not path.is_relative_to(limits.allowed_path.resolve()) or not path.is_file():
            raise OSError("outside")
        _check_bytes(path.stat().st_size, limits)
        return path.read_bytes()
    except RequestError:  # which is a ValueError too
        raise
    except (OSError, ValueError):
        # All causes have one message, so that clients cannot find out which files exist.
        raise RequestError("no such file below the server's media path.") from None


def _check_bytes(size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise RequestError(f"media of {size} bytes; the limit is {limits.max_bytes}.", 413)


# -- images ----------------------------------------------------------------------------------------


def load_image(url: str, limits: Limits, deadline: Deadline | None = None) -> Image.Image:
    """Load one image as RGB, upright as its EXIF data says, transparent parts white as in vLLM."""
    deadline = deadline or Deadline(limits.decode_seconds)
    return decode_image(read_url(url, limits)[1], limits, deadline)


def decode_image(content: bytes, limits: Limits, deadline: Deadline, count: int = 1) -> Image.Image:
    """Decode an image as `load_image`; `count` images of its size must fit the limits together."""
    with _opened(content, limits, deadline, count) as image:
        return on_white(ImageOps.exif_transpose(image), image.format)


def check_image(content: bytes, limits: Limits, deadline: Deadline, count: int = 1) -> int:
    """Check an image as `decode_image` without decoding its pixels; return how many it has."""
    with _opened(content, limits, deadline, count) as image:
        return int(image.width * image.height)


@contextlib.contextmanager
def _opened(content: bytes, limits: Limits, deadline: Deadline, count: int) -> Iterator[Any]:
    """An image whose header has an allowed size; what Pillow raises becomes a `RequestError`."""
    try:
        check_jpeg(content)
        image = Image.open(TimedReader(content, deadline), formats=IMAGE_FORMATS)
        check_size(image.width, image.height, limits, count)
        yield image
    except RequestError:
        raise
    except MediaError as error:
        raise RequestError(str(error)) from None
    except Image.DecompressionBombError:
        most = limits.max_pixels
        raise RequestError(f"an image has more pixels than the limit of {most}.", 413) from None
    except UnidentifiedImageError:
        known = ", ".join(IMAGE_FORMATS)
        raise RequestError(f"an image cannot be read; allowed: {known}.") from None
    except Exception as error:  # Pillow raises many types for damaged files
        name = type(error).__name__
        raise RequestError(f"an image is damaged ({name}). Send the whole file.") from None


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


# -- structure of files ----------------------------------------------------------------------------


def check_jpeg(content: bytes) -> None:
    """Refuse a JPEG with too many scans or segments; other files pass.

    Data after the image, such as the video of a phone's moving photo, is not read.
    """
    if content[:2] != b"\xff\xd8":
        return
    place, segments, scans = 2, 0, 0
    # Marks are searched, not decoded: thousands of scans take seconds each to decode.
    while mark := SEGMENT.search(content, place):
        code, place = mark[1][0], mark.end()
        if code == END and scans:
            return
        if code in (START_OF_FILE, END):
            continue
        segments, scans = segments + 1, scans + (code == SCAN)
        for count, limit, what in ((scans, MAX_SCANS, "scans"), (segments, MAX_SEGMENTS, "parts")):
            if count > limit:
                raise RequestError(f"a JPEG of more than {limit} {what}.", 413)
        # Over the contents of the segment, which could look like marks.
        place += max(int.from_bytes(content[place : place + 2], "big"), 2)


def count_frames(content: bytes, limit: int) -> int:
    """Number of frames of a GIF, at most `limit` + 1 (Pillow counts all); 0 for other files."""
    if content[:4] != b"GIF8" or len(content) < HEADER:
        return 0
    place, frames = HEADER + _color_table(content[10]), 0
    while place < len(content) and content[place] != TRAILER and frames <= limit:
        kind, place = content[place], place + 1
        # Header, color tables and sub-blocks are skipped by their lengths; no pixel is decoded.
        if kind == IMAGE:
            frames += 1
            flags = content[place + DESCRIPTOR - 1] if place + DESCRIPTOR <= len(content) else 0
            place = _after_blocks(content, place + DESCRIPTOR + _color_table(flags) + 1)
        elif kind == EXTENSION:
            place = _after_blocks(content, place + 1)
    return frames


def _color_table(flags: int) -> int:
    """Return the size of the color table that `flags` announce, in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(content: bytes, place: int) -> int:
    """The offset after a list of sub-blocks; each starts with its length."""
    while place < len(content) and content[place]:
        place += 1 + content[place]
    return place + 1
