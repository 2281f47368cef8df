"""Procedural clips with known events or cuts, encoded in many ways.

Event clips are ShapesQA questions whose answer is visible for half a second or a second of 32;
edited clips are films of shots with cuts, dissolves and fades. Both are functions of their split
and number.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

from tokencomp.zoo.shapesqa.items import Item, items
from tokencomp.zoo.shapesqa.render import render

RATE, HOLD, LOGICAL = 24, 12, 64
FAMILIES = ("needle", "video_existence", "order")
BACKGROUNDS = ("static", "noisy", "panning")
NOISE = 6
GROUP = {"g": "48"}
X264 = {"preset": "veryfast", "crf": "23"}
ENCODINGS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "mp4", X264),
    "h264 constant bitrate": (
        "libx264", "mp4",
        {"preset": "veryfast", "b": "80k", "maxrate": "80k", "bufsize": "40k"}),
    "h264 filled to its rate": (
        "libx264", "mp4",
        {"preset": "veryfast", "b": "200k", "maxrate": "200k", "bufsize": "100k",
         "x264-params": "nal-hrd=cbr"}),
    "h264 no B-frames": ("libx264", "mp4", {**X264, "tune": "zerolatency"}),
    "h264 open GOP": (
        "libx264", "mp4", {"preset": "veryfast", "x264-params": "open-gop=1:keyint=48"}),
    "hevc": ("libx265", "mp4", {"preset": "superfast", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", "webm", {"cpu-used": "8", "deadline": "realtime", "b": "300k"}),
    "vp9 two frames in one": (
        "libvpx-vp9", "webm", {"cpu-used": "5", "deadline": "good", "crf": "32", "b": "0",
                               "lag-in-frames": "25", "auto-alt-ref": "1"}),
    "av1": ("libsvtav1", "mp4", {"preset": "12", "crf": "40"}),
    "mpeg4": ("mpeg4", "mp4", {"b": "500k", "g": "50", "bf": "2"}),
}  # fmt: skip
VARIABLE = "h264 variable frame rate"
"""The clip as H.264, without 40 % of its frames."""


@dataclass(frozen=True)
class Material:
    """A clip before it is encoded.

    Attributes
    ----------
    name
        Split, kind and number.
    frames
        uint8 (height, width, 3) each, `RATE` per second.
    evidence
        Numbers of frames that show the answer; empty for edited clips.
    """

    name: str
    frames: Iterator[np.ndarray]
    evidence: frozenset[int]


def event_items(split: str, family: str, count: int) -> list[Item]:
    """The first `count` questions whose answer shows in some frames and not in all."""
    every = itertools.count(8)
    for number in every:
        found = [
            one
            for one in items(split, count * number, (family,), frames=LOGICAL)
            if 0 < len(one.evidence.frames) < LOGICAL
        ]
        if len(found) >= count:
            return found[:count]
    raise AssertionError


def events(item: Item, background: str, dissolves: bool = False) -> Material:
    """An event clip; with `dissolves` every change takes half a second."""
    name = f"{item.id} {background}" + (" dissolves" if dissolves else "")
    shown = frozenset(
        k * HOLD + n
        for k in item.evidence.frames
        for n in range(HOLD // 2 if dissolves else 0, HOLD)
    )
    return Material(name, _event_frames(item, background, dissolves, _rng(name)), shown)


def _event_frames(
    item: Item, background: str, dissolves: bool, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    before: np.ndarray | None = None
    for k, picture in enumerate(halved(item.pixels())):
        for n in range(HOLD):
            frame = picture
            if dissolves and before is not None:
                share = (n + 1) / HOLD
                frame = np.rint(share * picture + (1 - share) * before).astype(np.uint8)
            if background == "panning":
                frame = np.roll(frame, (k * HOLD + n) // 2 % frame.shape[1], axis=1)
            yield _noisy(frame, rng, NOISE) if background == "noisy" else frame
        before = picture


def edited(split: str, number: int, seconds: int = 40) -> Material:
    """A film: shots of 1 to 8 seconds from a few scenes, which come again, as in a dialogue."""
    name = f"{split} film {number}"
    return Material(name, _film(split, seconds, _rng(name)), frozenset())


def _film(split: str, seconds: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    scenes = [_scene(split, int(k)) for k in rng.integers(0, 40, 6)]
    left, last = seconds * RATE, None
    while left > 0:
        length = min(left, int(RATE * np.clip(rng.lognormal(1.0, 0.6), 1, 8)))
        pictures = scenes[rng.integers(len(scenes))]
        speed, noise = rng.choice([0, 0, 0.5, 1.5]), int(rng.choice([0, 2, 6]))
        change = rng.choice(["cut", "cut", "cut", "dissolve", "black"])
        start = int(rng.integers(len(pictures)))
        for n in range(length):
            picture = pictures[(start + n // 6) % len(pictures)]
            frame = np.roll(picture, int(speed * n) % picture.shape[1], axis=1)
            if last is not None and change != "cut" and n < HOLD:
                share, other = (n + 1) / HOLD, last if change == "dissolve" else 0 * last
                frame = np.rint(share * frame + (1 - share) * other).astype(np.uint8)
            yield _noisy(frame, rng, noise)
        last, left = frame, left - length


@cache
def _scene(split: str, number: int) -> np.ndarray:
    """Pictures of a scene in which something moves, uint8 (32, height, width, 3)."""
    family = ("direction", "action_count", "order", "needle")[number % 4]
    (*_, one) = items(split, number // 4 + 1, (family,), frames=LOGICAL // 2)
    return halved(render(one.scene))


def halved(pictures: np.ndarray) -> np.ndarray:
    """Pictures of half the width and height, each pixel the mean of four."""
    count, height, width, colors = pictures.shape
    parts = pictures.reshape(count, height // 2, 2, width // 2, 2, colors)
    return np.rint(parts.mean((2, 4))).astype(np.uint8)


def _noisy(frame: np.ndarray, rng: np.random.Generator, noise: int) -> np.ndarray:
    if not noise:
        return frame
    moved = frame + rng.integers(-noise, noise + 1, frame.shape, dtype=np.int16)
    return np.clip(moved, 0, 255).astype(np.uint8)


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def encode(material: Material, encoding: str, path: Path) -> list[int]:
    """Write a clip; returns the numbers of the frames in it."""
    import av

    codec, _, options = ENCODINGS["h264" if encoding == VARIABLE else encoding]
    rng, kept = _rng(material.name + encoding), []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, RATE)
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(material.frames):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            elif encoding == VARIABLE and rng.random() < 0.4:
                continue
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
            kept.append(number)
        container.mux(stream.encode())
    return kept


def suffix(encoding: str) -> str:
    """Suffix of the file."""
    return "." + ENCODINGS.get(encoding, ENCODINGS["h264"])[1]
