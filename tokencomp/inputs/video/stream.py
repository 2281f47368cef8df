"""The stream rule: frames where the compressed stream bursts, the rest evenly spaced. Ours.

An encoder spends bits where the picture changes. A frame that is large against its neighbours of
the same type shows something new, and a quiet clip has few of these. Where cuts follow each other,
every shot bursts, and evenly spaced frames stand best for the whole. The constants were found on
validation clips (`benchmarks/files/`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable

import numpy as np

from tokencomp.inputs.video.packets import ClipIndex, Packets

NEIGHBOURS = 12
"""Frames of the same type on either side, with whose median a frame is compared."""
BURST = 0.5
"""Least log of a size over that median for a burst: 65 % more bytes."""
HEADER = 16
"""Bytes that are added to every size: a frame without content still has its header."""
CUT = 0.4
"""A burst of this share of a key frame's bytes renews the picture."""
EARLY = 0.9
"""A key frame that comes after a smaller share of the longest distance is a cut."""
CUTS, SHOT = 3, 20.0
"""A clip is edited if it has so many cuts, and shots shorter than this, in seconds."""
APART, BEHIND = 1 / 4, 1 / 12
"""Seconds between two bursts, and from a burst to the frame that is taken."""
HIDDEN, LATER = frozenset(["vp9", "libdav1d", "av1"]), 0.3
"""Decoders whose packets also hold hidden frames of later times, and the seconds there."""


def stream_choice(index: ClipIndex, count: int) -> tuple[list[int], str]:
    """Places of `count` frames, ascending, and the rule in words.

    At most half of them are at bursts, the strongest first; the others divide the gaps between
    these evenly. The words begin with "even" if the stream does not decide, as always if `silence`
    has a reason.
    """
    if index.packets is None or silence(index):
        return even_gaps([], index.total, count), f"even: {silence(index)}"
    strength, cuts = bursts(index.packets)
    seconds = index.duration or 0.0
    if cuts >= CUTS and seconds / (cuts + 1) < SHOT:
        return even_gaps([], index.total, count), f"even: an edited clip of {cuts} cuts"
    rate = index.fps or 1.0
    found = _strongest(strength, count // 2, max(1, round(APART * rate)))
    behind = max(1, round((LATER if index.codec in HIDDEN else BEHIND) * rate))
    taken = {min(place + behind, index.total - 1) for place in found}
    if not taken:
        return even_gaps([], index.total, count), "even: the stream has no burst"
    return even_gaps(taken, index.total, count), f"stream: {len(taken)} bursts"


def silence(index: ClipIndex) -> str:
    """Why the stream gives no information about a clip; "" if it does."""
    packets = index.packets
    if packets is None:
        return f"a clip of {index.codec} has no sizes of compressed frames"
    if 4 * int((~packets.keys).sum()) < index.total:
        return f"nearly all frames of {index.codec} are key frames"
    return ""


def bursts(packets: Packets) -> tuple[np.ndarray, int]:
    """How far each frame stands out, as a log of sizes, float64 (n,); and the number of cuts."""
    sizes, keys, backward = np.log(packets.sizes + HEADER), packets.keys, packets.backward
    strength = np.zeros(len(sizes))
    ahead, behind = np.flatnonzero(~keys & ~backward), np.flatnonzero(~keys & backward)
    usual = _running_median(sizes[ahead])
    strength[ahead] = sizes[ahead] - usual
    if len(ahead) and len(behind):
        # A B-frame is small, and varies: it stands out where it is large for a forward frame, too.
        near = np.minimum(np.searchsorted(ahead, behind), len(ahead) - 1)
        strength[behind] = sizes[behind] - np.maximum(_running_median(sizes[behind]), usual[near])
    at = np.flatnonzero(keys)
    renewed = CUT * np.median(packets.sizes[at]) if len(at) else math.inf
    cuts = int((~keys & (packets.sizes > renewed) & (strength >= BURST)).sum())
    # Encoders place key frames at equal distances, and earlier only where they see a cut.
    distances = np.diff(np.append(at, len(sizes)))
    if len(at) > 1:
        early = at[1:][distances[:-1] < EARLY * distances.max()]
        strength[early] = sizes[early] - np.median(sizes[~keys])
        cuts += len(early)
    return strength, cuts


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median of each value with its neighbours, mirrored at the ends."""
    half = min(NEIGHBOURS, len(values) - 1)
    if half < 1:
        return values.copy()
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(values, half, mode="reflect"), 2 * half + 1
    )
    return np.asarray(np.median(windows, axis=1))


def _strongest(strength: np.ndarray, count: int, apart: int) -> list[int]:
    """Up to `count` bursts, strongest first, more than `apart` frames from each other."""
    found: list[int] = []
    free = np.ones(len(strength), bool)
    free[: 2 * apart + 1] = False  # the first frame is new by itself, and encoders settle after it
    for place in np.argsort(-strength, kind="stable"):
        if len(found) == count or strength[place] < BURST:
            break
        if free[place]:
            found.append(int(place))
            free[max(0, place - apart) : place + apart + 1] = False
    return found


def even_gaps(fixed: Iterable[int], total: int, count: int) -> list[int]:
    """`fixed` places and others that divide the gaps between them evenly: `count`, ascending.

    Each further frame goes to the widest gap. Without `fixed` these are the middles of equal parts.
    """
    places = sorted(fixed)
    bounds = [-1, *places, total]
    # At the ends of the clip, half a distance is left, and a whole one next to a fixed place.
    ends = [0.5 * (k == 0) + 0.5 * (k == len(places)) for k in range(len(places) + 1)]
    starts = [a + 1 for a in bounds[:-1]]
    widths = [b - a - 1 for a, b in itertools.pairwise(bounds)]
    inside = [0] * len(widths)
    heap = [(-_distance(widths[k], 0, ends[k]), k) for k in range(len(widths))]
    heapq.heapify(heap)
    for _ in range(min(count, total) - len(places)):
        _, k = heapq.heappop(heap)
        inside[k] += 1
        wider = _distance(widths[k], inside[k], ends[k]) if inside[k] < widths[k] else 0.0
        heapq.heappush(heap, (-wider, k))
    for k, number in enumerate(inside):
        step = widths[k] / (number + 1 - ends[k]) if number else 0.0
        first = 0.5 if k == 0 else 1.0
        places += [starts[k] + int(step * (first + m)) for m in range(number)]
    return sorted(places)


def _distance(width: int, inside: int, ends: float) -> float:
    """Frames between two chosen ones in a gap that holds `inside` of them."""
    return width / max(inside + 1 - ends, 0.5)
