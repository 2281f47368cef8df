"""Media files that clients send, hostile ones among them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from support.serving import media as tiny


def data(content: bytes, kind: str = "image/png") -> str:
    """Return a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def content(url: str) -> bytes:
    """Return what is in a data: URL."""
    return base64.b64decode(url.partition(",")[2])


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    """Return a grey picture, which has few bytes whatever its size."""
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, kind)
    return out.getvalue()


def image(side: int) -> str:
    """Return a square picture."""
    return data(picture(side, side))


def frames(side: int, count: int) -> str:
    """Return a list of frames."""
    encoded = base64.b64encode(picture(side, side)).decode()
    return "data:video/jpeg;base64," + ",".join([encoded] * count)


def encoded(
    arrays: Iterable[np.ndarray], rate: Any = 4, name: str = "mp4", codec: str = "mpeg4"
) -> str:
    """Return a video file of frames, uint8 (height, width, 3)."""
    import av

    out, stream = io.BytesIO(), None
    with av.open(out, "w", format=name) as container:
        for array in arrays:
            if stream is None:
                stream = container.add_stream(codec, rate=Fraction(rate))
                stream.height, stream.width, stream.pix_fmt = *array.shape[:2], "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(array))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return data(out.getvalue(), f"video/{name}")


def clip(side: int, count: int) -> str:
    """Return a video file of random frames."""
    return encoded(tiny.video(1, count, side, side))


def still(side: int, count: int) -> str:
    """Return a video file of one colour."""
    return encoded(np.zeros((side, side, 3), np.uint8) for _ in range(count))


def gif(side: int, count: int) -> str:
    """Return an animation."""
    out = io.BytesIO()
    pictures = [Image.new("RGB", (side, side), (9 * i, 0, 0)) for i in range(count)]
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:])
    return data(out.getvalue(), "video/gif")


def canvas(side: int, count: int) -> str:
    """Return an animation of dots on a large canvas: few bytes, very many pixels."""
    header = b"GIF89a" + side.to_bytes(2, "little") * 2 + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    dot = b"," + bytes(4) + b"\1\0\1\0\0" + b"\2\2D\1\0"
    return data(header + dot * count + b";", "video/gif")


def png(side: int, **parts: bytes) -> str:
    """Return a PNG file that promises so many pixels, with further parts (eXIf, …)."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    result = b"\x89PNG\r\n\x1a\n"
    for name, part in (("IHDR", header), *parts.items(), ("IDAT", zlib.compress(b"\0\0"))):
        result += struct.pack(">I", len(part)) + name.encode() + part
        result += struct.pack(">I", zlib.crc32(name.encode() + part))
    return data(result + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
