"""Video files of every codec that PyAV can write, with pictures that tell their own number."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

QUIET = {"x265-params": "log-level=none"}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", ".mp4", {"preset": "veryfast"}),
    "h264-no-b": ("libx264", ".mp4", {"bf": "0", "preset": "veryfast"}),
    "h264-open": ("libx264", ".mkv",
                  {"x264-params": "open-gop=1:keyint=20:min-keyint=20:bframes=3"}),
    "h264-refresh": ("libx264", ".mp4", {"x264-params": "intra-refresh=1:keyint=15"}),
    "h264-ts": ("libx264", ".ts", {"g": "16"}),
    "hevc": ("libx265", ".mp4", {"preset": "veryfast", **QUIET}),
    "hevc-open": ("libx265", ".mkv",
                  {"x265-params": "log-level=none:open-gop=1:keyint=20:min-keyint=20:bframes=3"}),
    "vp9": ("libvpx-vp9", ".webm", {"cpu-used": "8", "deadline": "realtime"}),
    "vp8": ("libvpx", ".webm", {"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "4"}),
    "av1": ("libsvtav1", ".mp4", {"preset": "12", "svtav1-params": "keyint=24"}),
    "mpeg4": ("mpeg4", ".mp4", {"bf": "2"}),
    "mpeg4-avi": ("mpeg4", ".avi", {}),
    "mpeg2": ("mpeg2video", ".mpg", {"bf": "2"}),
    "mjpeg": ("mjpeg", ".avi", {}),
    "gif": ("gif", ".gif", {}),
}  # fmt: skip
"""Name → encoder, suffix, options of the encoder."""


def pictures(count: int, width: int = 96, height: int = 64, seed: int = 0) -> np.ndarray:
    """Frames of a bright block that moves over a pattern, uint8 (count, height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 160, (height // 8, width // 8, 3))
    back = small.repeat(8, 0).repeat(8, 1).astype(np.uint8)
    frames = np.repeat(back[None], count, 0)
    for k in range(count):
        left, top = (5 * k) % (width - 16), (3 * k) % (height - 16)
        frames[k, top : top + 16, left : left + 16] = (255, (13 * k) % 256, 20)
    return frames


def write_clip(
    folder: Path,
    name: str,
    frames: np.ndarray,
    rate: int = 24,
    times: list[int] | None = None,
    **more: str,
) -> Path:
    """Encode `frames` as the codec `name`; `times` are their numbers on a clock of `rate` ticks."""
    import av

    encoder, suffix, options = CODECS[name]
    path = folder / f"{name}{suffix}"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=rate, options={**options, **more})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(encoder, "yuv420p")
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.thread_count = 1  # the sizes of packets are the same in every run
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[k] if times else k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def damage(path: Path, numbers: range) -> None:
    """Overwrite the packets with these numbers, in decoding order, by zeros."""
    import av

    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    head = 8 if path.suffix in (".webm", ".mkv") else 0  # of the container, before the content
    for k in numbers:
        start, length = packets[k]
        content[start + head : start + length] = bytes(length - head)
    path.write_bytes(content)


def without(path: Path, numbers: range) -> Path:
    """A copy of a file that lacks the packets with these numbers."""
    import av

    copy = path.with_stem("part")
    with av.open(str(path)) as old, av.open(str(copy), "w") as new:
        stream: Any = new.add_stream_from_template(old.streams.video[0])
        for k, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if k not in numbers:
                packet.stream = stream
                new.mux(packet)
    return copy


def decodable(path: Path) -> dict[int, np.ndarray]:
    """Pictures of a damaged file by their number in the order in which they are shown."""
    import av

    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        order, found = sorted(p.pts for p in packets), {}
        for packet in [*packets, None]:
            with contextlib.suppress(av.error.FFmpegError):
                for frame in container.streams.video[0].codec_context.decode(packet):
                    found[order.index(frame.pts)] = frame.to_ndarray(format="rgb24")
    return found
