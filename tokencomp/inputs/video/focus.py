"""FOCUS (2510.27280): scores where the clip promises most, and frames from its best parts.

The published code draws from a generator that all questions share; here every choice starts at its
seed, so that it depends on the clip and the question alone. There, scores of the second round do
not reach the statistics of the parts, against the paper; here they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

PART, FINE = 16.0, 1.0
"""Seconds of a part, and between two frames of a part that is scored closely."""
PARTS, CLOSE, SHARE, MOST = 8, 4, 0.25, 32
"""Least parts of a clip; least of them that are scored closely and give frames, the share of them
that are, and the most that give frames."""
FIRST, EVEN, TOP, SOFT = 2, 0.5, 0.2, 0.06
"""Random frames of a part in the first round; share of even ones in the second; share of the result
that the best scores take; temperature of the rest."""
LEAST = 1e-6  # variance
GAP, GAP_SHARE, DENSE = 1.0, 0.25, 0.2
"""Frames of the rest keep this many seconds, or this share of their mean distance if that is less,
from earlier ones; below the last distance, in seconds, none."""
SEED = 42

Score = Callable[[Sequence[int]], dict[int, float]]
"""Scores of the frames at some places; places of frames that cannot be read are missing."""


@dataclass
class Arm:
    """A part of the clip: places `start` to `end`, inclusive, and their known scores."""

    start: int
    end: int
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def centre(self) -> int:
        return (self.start + self.end) // 2

    def bound(self, samples: int) -> float:
        """Upper confidence bound of the mean score of this part, after `samples` scores in all."""
        known = np.asarray([*self.scores.values()])
        if not len(known):
            return -math.inf
        log, variance = math.log(max(samples, 1)), max(float(known.var()), LEAST)
        doubt = math.sqrt(2 * log * variance / len(known)) + 3 * log / len(known)
        return float(known.mean()) + doubt


def focus(score: Score, total: int, rate: float, count: int) -> list[int]:
    """Places of `count` frames of a clip of `total` frames, `rate` per second, ascending.

    Every part of 16 seconds is scored at its centre and at two random places. The quarter with the
    highest bounds is scored once per second. A fifth of the frames are those of the best scores;
    the others are shared out evenly over the best parts, and drawn there by the nearest score.
    Where parts are too short for that, the best scored frames that are left fill the count, and
    after these, the others in order.
    """
    if total <= count:
        return list(range(total))
    rng, wanted = np.random.default_rng(SEED), max(PARTS, math.ceil(total / rate / PART))
    arms = _parts(total, max(1, total // wanted))
    share = max(CLOSE, math.ceil(SHARE * len(arms)))
    first = []
    for arm in arms:  # the centre and random places
        free = [place for place in range(arm.start, arm.end + 1) if place != arm.centre]
        first += [arm.centre, *_random(free, FIRST, rng)]
    scores = score(first)
    _learn(arms, scores)
    step = min(max(1, round(FINE * rate)), max(1, total // wanted))
    half, known, close = max(1, round(total / wanted / 2)), set(first), set[int]()
    for arm in _best(arms)[:share]:
        window = range(max(0, arm.centre - half), min(total, arm.centre + half + 1))
        close |= _closely(window, step, known | close, rng)
    more = score(sorted(close)) if close else {}  # all frames of the windows are known
    _learn(arms, more)
    scores |= more
    ranked = sorted(scores, key=lambda place: (-scores[place], place))
    taken = set(ranked[: round(TOP * min(count, len(scores)))])
    distance = total / rate / count  # in seconds
    gap = 0 if distance <= DENSE else round(min(GAP, GAP_SHARE * distance) * rate)
    _draw(_best(arms)[: min(share, MOST)], taken, count - len(taken), gap, rng)
    left = [p for p in dict.fromkeys([*ranked, *range(total)]) if p not in taken]
    return sorted([*taken, *left[: count - len(taken)]])


def _parts(total: int, length: int) -> list[Arm]:
    """Parts of equal length, without the remainder at the end of the clip."""
    number = total // length
    length = total // number
    return [Arm(k * length, (k + 1) * length - 1) for k in range(number)]


def _random(free: list[int], count: int, rng: np.random.Generator) -> list[int]:
    count = min(count, len(free))
    return rng.choice(free, size=count, replace=False).tolist() if count else []


def _learn(arms: list[Arm], scores: dict[int, float]) -> None:
    for arm in arms:
        arm.scores |= {p: s for p, s in scores.items() if arm.start <= p <= arm.end}


def _best(arms: list[Arm]) -> list[Arm]:
    """Parts by their bounds, highest first."""
    samples = sum(len(arm.scores) for arm in arms)
    return sorted(arms, key=lambda arm: -arm.bound(samples))


def _closely(window: range, step: int, known: set[int], rng: np.random.Generator) -> set[int]:
    """New places in a window, one per `step`: half evenly spaced, half random."""
    wanted = max(1, len(window) // step)
    even = round(EVEN * wanted)
    width = len(window) / even if even else 0.0
    found = {window[int(k * width + width / 2)] for k in range(even)} - known
    free = [place for place in window if place not in known and place not in found]
    return found | set(_random(free, wanted - even, rng))


def _draw(arms: list[Arm], taken: set[int], count: int, gap: int, rng: np.random.Generator) -> None:
    """Add `count` places, distributed over `arms`, to `taken`."""
    for rank, arm in enumerate(arms):
        wanted = count // len(arms) + (rank < count % len(arms))
        free = [p for p in range(arm.start, arm.end + 1) if p not in taken]
        far = [p for p in free if all(abs(p - other) >= gap for other in taken)] or free
        if not (wanted and far and arm.scores):
            continue
        known = np.asarray(sorted(arm.scores))
        nearest = [arm.scores[int(known[np.abs(known - place).argmin()])] for place in far]
        size = min(wanted, len(far))
        drawn = rng.choice(len(far), size=size, p=_chances(np.asarray(nearest)), replace=False)
        taken.update(far[k] for k in drawn)


def _chances(scores: np.ndarray) -> np.ndarray:
    """Softmax of the scores, scaled to [0, 1] before: float64 (n,)."""
    spread = float(np.ptp(scores))
    known = (scores - scores.min()) / spread if spread else np.ones_like(scores)
    weights = np.exp((known - known.max()) / SOFT)
    return np.asarray(weights / weights.sum())
