"""Reducers as MLX arrays: the tokens of `tokencomp.reducers` without torch.

They see patches alone and return kept rows, ascending. Rules, tolerances and ties are those of the
reducers of the same name; scores are in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from tokencomp.errors import ScoreError
from tokencomp.plan.counts import frame_budgets

Grid = tuple[int, int, int]
Select = Callable[..., np.ndarray]
EPSILON = 1e-5  # smallest distance, so that rounding does not rank copies of a row
TIED = 1 - 4e-6  # scores of at least this share of the best tie with it
TEMPERATURE = 0.01  # of the softmax over frames of vidcom2
BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))
CHUNK = 1024  # rows of a table of distances that are computed at once
STEPS = 64  # choices between two evaluations, which keep the graph small
TURN = math.pi * (3 - math.sqrt(5))  # the golden angle, between two steps of a video
STEP_WEIGHT, STEPS_FROM = 4.0, 12  # of the default on videos, if it keeps a row of so many


def auto(x: mx.array, grid: Grid, keep: int) -> np.ndarray:
    """The default: `kcenter`, in videos with what changes from step to step."""
    return kcenter(x, grid, keep, STEP_WEIGHT if grid[0] > 1 and STEPS_FROM * keep >= len(x) else 0)


def kcenter(x: mx.array, grid: Grid, keep: int, step_weight: float = 0.0) -> np.ndarray:
    """Farthest-point choice by root mean square, from the row farthest from the mean."""
    x = finite(x)
    if step_weight:
        x = _with_steps(x, grid, step_weight)
    start = _first_best(((x - x.mean(0)) ** 2).sum(1))

    def distance(row: mx.array) -> mx.array:
        return mx.sqrt(((x - x[row]) ** 2).mean(1))

    return _greedy(distance, start, len(x), keep)


def _with_steps(x: mx.array, grid: Grid, weight: float) -> mx.array:
    """Features and the change from step to step, shape (n, d + 2); as `reducers.kcenter`."""
    t, area = grid[0], grid[1] * grid[2]
    frames, none = x.reshape(t, area, -1), mx.zeros((1, area))
    steps = mx.sqrt(((frames[1:] - frames[:-1]) ** 2).mean(-1))
    change = mx.maximum(mx.concatenate([none, steps]), mx.concatenate([steps, none])).reshape(-1, 1)
    angles = TURN * np.repeat(np.arange(t), area)
    turn = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    return mx.concatenate([x, weight * math.sqrt(x.shape[1] / 2) * change * mx.array(turn)], 1)


def divprune(x: mx.array, grid: Grid, keep: int) -> np.ndarray:
    """Greedy max-min cosine distance (2503.02175), from the row whose nearest is farthest."""
    rows = _unit(finite(x))

    def distance(row: mx.array) -> mx.array:
        return 1 - rows @ rows[row]

    nearest = []
    for first in range(0, len(rows), CHUNK):
        part = mx.maximum(1 - rows[first : first + CHUNK] @ rows.T, EPSILON)
        own = mx.arange(len(rows))[None] == mx.arange(first, first + len(part))[:, None]
        nearest.append(mx.where(own, mx.inf, part).min(1))
    return _greedy(distance, _first_best(mx.concatenate(nearest)), len(x), keep)


def vidcom2(x: mx.array, grid: Grid, keep: int) -> np.ndarray:
    """Least similar to video and frame, over the quiet channels (2505.14454)."""
    x = finite(x)
    t, h, w = grid
    quiet = np.argsort(np.array(x.var(0)), kind="stable")[: max(1, x.shape[1] // 2)]
    frames = _unit(x[:, mx.array(quiet)]).reshape(t, h * w, -1)
    video = _similarity(frames, frames.mean((0, 1), keepdims=True))
    score = np.array(video + _similarity(frames, frames.mean(1, keepdims=True)))
    logits = -np.array(video.mean(1)) / TEMPERATURE
    share = np.exp(logits - logits.max())
    budgets = frame_budgets((1 + share / share.sum() - 1 / t).tolist(), keep, [h * w] * t)
    kept = [
        frame * h * w + np.sort(np.argsort(score[frame], kind="stable")[:budget])
        for frame, budget in enumerate(budgets)
    ]
    return np.concatenate(kept)


def uniform(x: mx.array, grid: Grid, keep: int) -> np.ndarray:
    """Row floor((i + ½)·n/k) for i = 0 … k-1."""
    return (2 * np.arange(keep) + 1) * len(x) // (2 * keep)


def random(x: mx.array, grid: Grid, keep: int, seed: int = 0) -> np.ndarray:
    """The subset of torch's generator: the low 24 bits of MT19937 are its float32 numbers."""
    bits = np.random.RandomState(seed % 2**32)._bit_generator.random_raw(len(x)) & 0xFFFFFF
    return np.sort(np.argsort(-bits.astype(np.int64), kind="stable")[:keep])


def merged(x: mx.array, kept: np.ndarray, special: np.ndarray) -> tuple[mx.array, np.ndarray]:
    """Average every other row of x (n, d) into the kept row with the largest cosine.

    `kept` int64 (k,) is ascending, with all rows that are `special` (bool, (n,)), which merge with
    none, and at least one other. Returns means, float32 (k, d), and of how many rows, int64 (k,).
    """
    x, slots = finite(x), np.arange(len(kept))
    unit, takes = _unit(x), mx.array(~special[kept])[:, None]
    centres = unit[mx.array(kept)]
    total, sizes = mx.zeros((len(kept), x.shape[1])), np.zeros(len(kept), dtype=np.int64)
    for first in range(0, len(x), CHUNK):
        part = x[first : first + CHUNK]
        cosines = centres @ unit[first : first + CHUNK].T
        slot = np.array(mx.where(takes, cosines, -mx.inf).argmax(0)).astype(np.int64)
        own = (kept >= first) & (kept < first + len(part))
        slot[kept[own] - first] = slots[own]
        member = slots[:, None] == slot
        total, sizes = total + mx.array(member).astype(mx.float32) @ part, sizes + member.sum(1)
        mx.eval(total)
    return total / mx.array(sizes)[:, None], sizes


SELECT: dict[str, Select] = {
    f.__name__: f for f in (auto, kcenter, divprune, vidcom2, uniform, random)
}


def finite(x: mx.array) -> mx.array:
    """Features in float32, refused if one is not finite, because nothing could be compared."""
    x = x.astype(mx.float32)
    if not bool(mx.isfinite(x).all()):
        raise ScoreError(
            "features of an image or video are not finite, so they cannot be compared. Load the "
            "model in bfloat16 or float32, or use reducer='uniform'."
        )
    return x


def _greedy(
    distance: Callable[[mx.array], mx.array], start: mx.array, count: int, keep: int
) -> np.ndarray:
    """Choose the row farthest from all chosen so far, `keep` times."""
    nearest, taken, last = mx.full((count,), mx.inf), mx.zeros((count,)), start
    chosen = []
    for step in range(keep):
        chosen.append(last)
        taken = mx.where(mx.arange(count) == last, 1, taken)
        nearest = mx.minimum(nearest, mx.maximum(distance(last), EPSILON))
        last = _first_best(mx.where(taken > 0, -1, nearest))
        if step % STEPS == 0:
            mx.eval(nearest, taken, last)
    return np.sort(np.array(mx.stack(chosen)).astype(np.int64))


def _first_best(scores: mx.array) -> mx.array:
    """Index of the first of the scores that tie with the best."""
    best = scores.max()
    return (scores >= mx.minimum(best, best * TIED)).astype(mx.int32).argmax()


def _unit(x: mx.array) -> mx.array:
    norm = mx.sqrt((x * x).sum(1, keepdims=True))
    return x / mx.maximum(norm, np.finfo(np.float32).tiny)


def _similarity(x: mx.array, centre: mx.array) -> mx.array:
    """Sum of Gaussians of the distance between x (…, c) and centre, shape (…)."""
    squared = ((x - centre) ** 2).sum(-1)
    return mx.stack([mx.exp(-squared / (2 * a)) for a in BANDWIDTHS]).sum(0)
