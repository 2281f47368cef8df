"""A speedup as a goal: tower and decoder together take a fraction of their work for every item.

A *path* is a sequence of settings (tower ratio, ratio), the first without compression. Along it the
work of an item falls, and the point at which it has fallen by the factor is its setting:

    path        (0, 0) ────── (.25, .5) ──────── (.4, .75) ─────── (.6, .8) ──── …
    work         100 %           69 %        50 %   48 %              33 %
                                              speedup=2: tower ratio .38, ratio .72

The work of an item follows from its size alone. So the tokens that are kept of a picture depend
neither on its question nor on its neighbours, and caches of media stay valid.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from tokencomp.errors import RatioError
from tokencomp.plan.counts import MAX_BUDGET, Budget, BudgetShare
from tokencomp.validation import fits


@dataclass(frozen=True)
class Point:
    """A setting on a path: the shares of the tower's cells and of the decoder's tokens removed."""

    tower: float
    ratio: float


# Settings that validation questions of the embedded tiny Qwen3-VL favour at equal total time
# (benchmarks/frontier, measured before these paths existed).
PATHS: dict[str, tuple[Point, ...]] = {
    "image": (
        Point(0.0, 0.0), Point(0.25, 0.5), Point(0.4, 0.75), Point(0.6, 0.8), Point(0.65, 0.9),
        Point(0.8, 0.95),
    ),
    "video": (
        Point(0.0, 0.0), Point(0.25, 0.5), Point(0.5, 0.52), Point(0.6, 0.75), Point(0.65, 0.9),
        Point(0.8, 0.95),
    ),
}  # fmt: skip
MOST_SPEEDUP = 20.0
STEPS = 40  # of the bisection


class Work(Hashable, Protocol):
    """FLOPs of one item, from pixels to the end of the decoder."""

    def flops(self, modality: str, cells: int, frames: int, point: Point) -> float: ...


def check_speedup(speedup: Any) -> float:
    """Return `speedup` as a float above 1; raise `RatioError` otherwise."""
    if not fits(speedup, float) or not 1.0 < speedup <= MOST_SPEEDUP:
        raise RatioError(
            f"speedup={speedup!r}: expected a number above 1 and at most {MOST_SPEEDUP:g}, the "
            "factor by which the work of tower and decoder falls. Use e.g. speedup=2."
        )
    return float(speedup)


def at(path: tuple[Point, ...], place: float) -> Point:
    """The point at `place` of a path, from 0 to its number of lines, between its corners."""
    first = min(int(place), len(path) - 2)
    a, b, share = path[first], path[first + 1], place - first
    return Point(a.tower + share * (b.tower - a.tower), a.ratio + share * (b.ratio - a.ratio))


@lru_cache(4096)
def solve(work: Work, speedup: float, modality: str, cells: int, frames: int) -> Point:
    """The setting of an item of `cells` cells in `frames` frames; at most the end of the path."""
    path = PATHS[modality]
    full = work.flops(modality, cells, frames, path[0])
    low, high = 0.0, float(len(path) - 1)
    if full <= speedup * work.flops(modality, cells, frames, path[-1]):
        return path[-1]
    for _ in range(STEPS):
        middle = (low + high) / 2
        if full > speedup * work.flops(modality, cells, frames, at(path, middle)):
            high = middle
        else:
            low = middle
    return at(path, high)


def largest(work: Work, modality: str, cells: int, frames: int) -> float:
    """The speedup at the end of the path."""
    path = PATHS[modality]
    ends = (work.flops(modality, cells, frames, point) for point in (path[0], path[-1]))
    return next(ends) / max(next(ends), 1.0)


@dataclass(frozen=True)
class Goal(Budget):
    """A budget of every item that follows from a speedup; of the tower, or of the decoder."""

    tokens: int = MAX_BUDGET
    speedup: float = 1.0
    work: Work | None = None
    of_tower: bool = False

    def __str__(self) -> str:
        return f"speedup={self.speedup:g}"

    def left(self, share: BudgetShare) -> float:
        if self.work is None or share.modality not in PATHS:
            return 1.0  # sounds stay whole
        item = share.modality, max(1, sum(share.parts)), max(1, share.frames)
        point = solve(self.work, self.speedup, *item)
        return 1.0 - (point.tower if self.of_tower else point.ratio)
