"""Scores of frames, and the rule of AKS."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokencomp.errors import ScoreError

DEPTH, STANDS_OUT = 5, 0.8  # of the published code


def checked_scores(scores: Any, count: int) -> np.ndarray:
    """Scores as float64 (count,), all finite."""
    values = np.asarray(scores, np.float64)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ScoreError(
            f"the scorer returned {scores!r:.200} for {count} frames: return one finite number per "
            "frame."
        )
    return values


def aks(scores: np.ndarray, count: int) -> list[int]:
    """Places of `count` frames by AKS (2502.21271) from float64 scores (n,), ascending.

    A part of the clip whose best scores exceed its mean by a margin gives its best frames; any
    other part is halved, and each half gets half the count. The published code stops at 32 parts,
    and so takes nothing if fewer than 32 frames are wanted and no part stands out; here recursion
    stops at single frames, and the best remaining frames fill the count.
    """
    spread = float(np.ptp(scores))
    known = (scores - scores.min()) / spread if spread else np.zeros_like(scores)
    best = np.argsort(-known, kind="stable")
    deepest = min(DEPTH, count.bit_length() - 1)
    taken: set[int] = set()
    parts = [(0, len(known), 0)]
    while parts:
        start, stop, depth = parts.pop()
        part = [int(k) for k in best if start <= k < stop]
        top = known[part[:count]].mean() if part else 0.0
        if depth == deepest or len(part) < 2 or top - known[part].mean() > STANDS_OUT:
            taken.update(part[: count >> depth])
            continue
        middle = (start + stop) // 2
        parts += [(start, middle, depth + 1), (middle, stop, depth + 1)]
    rest = [int(k) for k in best if int(k) not in taken]
    return sorted([*taken, *rest[: max(0, count - len(taken))]])
