"""Information about the frames of a file before any is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

STEADY = 0.9
"""Share of the distances in time that are alike in a clip of constant rate."""
NEAR = 0.01
"""A mean frame rate this close to the one in the header is that rate, which is an exact number."""


@dataclass(frozen=True)
class Packets:
    """The compressed frames of a video, in the order in which they are shown, (n,) each.

    `pts`: when each frame is shown, on the clock of the stream, int64, strictly ascending; `order`:
    its place in the order of decoding, int64; `sizes`: its bytes, int64; `keys`: whether decoding
    can start at it, bool.
    """

    pts: np.ndarray
    order: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray

    @property
    def backward(self) -> np.ndarray:
        """Whether a frame is shown before one that is decoded before it (B-frames): bool (n,)."""
        decoded = np.argsort(self.order)
        latest = np.maximum.accumulate(decoded)
        late = np.zeros(len(decoded), bool)
        late[decoded] = decoded < latest
        return late

    @property
    def leading(self) -> bool:
        """Whether a frame is shown before a key frame that is decoded before it."""
        latest = np.maximum.accumulate(self.order)
        return bool((latest > self.order)[self.keys].any())

    @cached_property
    def starts(self) -> np.ndarray:
        """The key frame from which each frame is decoded: places, int64 (n,), -1 if none."""
        return np.maximum.accumulate(np.where(self.keys, np.arange(len(self.keys)), -1))


@dataclass(frozen=True)
class ClipIndex:
    """The frames of a clip: number, times, and storage.

    `fps` is a mean if the rate varies; `times` are seconds from the first frame, float64 (total,);
    both None if unknown. `codec` is the decoder's name, or "frames" for a folder of pictures, and
    `packets` is None if the file has no compressed frames. `lacking` counts frames that the header
    or the clock promises and the file has not, as after a cut.
    """

    total: int
    fps: float | None = None
    times: np.ndarray | None = None
    codec: str = "frames"
    packets: Packets | None = None
    lacking: int = 0

    @property
    def duration(self) -> float | None:
        """Seconds, up to the end of the last frame; None if unknown."""
        if self.times is None or not self.fps:
            return None
        return float(self.times[-1]) + 1 / self.fps

    def uneven_times(self, places: Iterable[int]) -> tuple[float, ...] | None:
        """Times of the frames at `places`, unless they follow from frame numbers and the rate."""
        at = np.asarray(list(places), int)
        if self.times is None or not self.fps:
            return None
        times = self.times[at]
        return None if np.abs(times * self.fps - at).max(initial=0) < 0.5 else tuple(times.tolist())


def animation_index(shown: Sequence[float], codec: str) -> ClipIndex:
    """The index of pictures that are shown for so many seconds each."""
    seconds = sum(shown)
    if not seconds:
        return ClipIndex(len(shown), None, None, codec)
    return ClipIndex(len(shown), len(shown) / seconds, np.cumsum([0.0, *shown[:-1]]), codec)


def packets_of(seen: Iterable[tuple[int, int, bool]]) -> Packets:
    """Packets from (pts, size, key) in decoding order; of equal pts the first counts."""
    rows = np.asarray(list(seen), np.int64).reshape(-1, 3)
    pts, first = np.unique(rows[:, 0], return_index=True)
    order = np.argsort(np.argsort(first))
    return Packets(pts, order, rows[first, 1], rows[first, 2].astype(bool))


def index_of(packets: Packets, clock: Any, rate: Any, codec: str) -> ClipIndex:
    """The index of a file.

    `clock` is the seconds per tick of packet times, and `rate` the frame rate of the header;
    packets take precedence.
    """
    times = (packets.pts - packets.pts[:1]) * float(clock)
    total, fps = len(times), float(rate) if rate else None
    if total > 1:
        mean = (total - 1) / float(times[-1])
        fps = fps if fps and abs(fps / mean - 1) < NEAR else mean
    return ClipIndex(total, fps, times, codec, packets)


def missing(times: np.ndarray | None, ends: float | None) -> int:
    """How many more frames a clip of constant rate would have, up to `ends` seconds if known.

    A clip is of constant rate if nearly all frames follow each other at one distance d:

        times   0   d   2d               6d   7d        ends = 9d
                ·   ·   ·   (3d 4d 5d)   ·    ·   (8d)            4 missing

    `times` are seconds from the first frame, float64 (n,).
    """
    gaps = np.diff([] if times is None else times)
    if times is None or not len(gaps):
        return 0
    alike = np.abs(gaps / np.median(gaps) - 1) < 0.5
    if alike.mean() < STEADY:
        return 0
    step = gaps[alike].mean()  # times in whole milliseconds make single distances inexact
    return max(round(max(ends or 0.0, times[-1] + step) / step) - len(times), 0)
