"""Lazy greedy facility location in plain PyTorch, with the steps on the host."""

from typing import Any

import numpy as np
import torch
from tokencomp.kernels.maxmin_select.rounds import TIED
from torch import Tensor

# Entries of a matrix of coverings that are in memory at once.
DENSE_ENTRIES = 1 << 24
# Gains that are computed together. More would compute some that no choice needs.
TOGETHER = 8
# A covering that improves by less than this share does so by rounding.
ROUNDING = 1e-5

Numbers = np.ndarray[Any, np.dtype[Any]]


class Coverage:
    """How well every row of one span covers every point, and the best covering so far.

    Attributes
    ----------
    best
        Covering of every point by the chosen rows, ``(m,)``.
    """

    def __init__(self, unit: Tensor, points: Tensor, offset: Tensor | None) -> None:
        self.unit, self.points, self.offset = unit, points, offset
        fits = len(unit) * len(points) <= DENSE_ENTRIES
        self.dense = self._covers(unit).cpu().numpy() if fits else None
        dtype = np.float64 if unit.dtype == torch.float64 else np.float32
        self.best: Numbers = np.zeros(len(points), dtype=dtype)

    def first_gains(self) -> Numbers:
        """Gain of every row while none is chosen, ``(L,)``."""
        if self.dense is not None:
            return self.dense.sum(1)
        parts = self.unit.split(max(1, DENSE_ENTRIES // max(1, len(self.points))))
        return torch.cat([self._covers(part).sum(1) for part in parts]).cpu().numpy()

    def gains(self, rows: Numbers) -> Numbers:
        """By how much each of `rows` would improve the covering of all points together."""
        covers = self.columns(rows)
        better = covers > self.best * (1 + ROUNDING)
        return np.where(better, covers - self.best, 0).sum(1)

    def choose(self, row: int) -> None:
        """Add a row to the chosen ones."""
        np.maximum(self.best, self.columns(np.array([row]))[0], out=self.best)

    def columns(self, rows: Numbers) -> Numbers:
        """Coverings of all points by each of `rows`, ``(rows, m)``."""
        if self.dense is not None:
            return self.dense[rows]
        chosen = self.unit[torch.from_numpy(rows).to(self.unit.device)]
        return self._covers(chosen).cpu().numpy()

    def _covers(self, rows: Tensor) -> Tensor:
        products = rows @ self.points.T
        return products.clamp_(min=0) if self.offset is None else (products - self.offset).exp_()


def facility_select(
    unit: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    points: Tensor | None,
    reach: list[int],
    offset: Tensor | None,
) -> Tensor:
    """Return the chosen rows of all spans, ascending."""
    covered = (unit if points is None else points).split(reach)
    offsets = [None] * len(reach) if offset is None else offset.split(reach)
    chosen, start = [np.empty(0, dtype=np.int64)], 0
    for rows, count, own, shift in zip(unit.split(lengths), counts, covered, offsets, strict=True):
        if count:
            factor = None if weights is None else weights[start : start + len(rows)].cpu().numpy()
            chosen.append(start + greedy(Coverage(rows, own, shift), len(rows), count, factor))
        start += len(rows)
    return torch.from_numpy(np.concatenate(chosen)).to(unit.device)


def greedy(coverage: Coverage, length: int, count: int, weight: Numbers | None) -> Numbers:
    """Choose `count` of `length` rows; the result is ascending.

    `scores` are upper bounds, exact where `seen` is the present step. A chosen row has the score
    -1.
    """
    scores = coverage.first_gains()
    if weight is not None:
        scores = scores * weight
    seen, taken = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.bool_)
    for step in range(count):
        while True:
            fresh = (seen == step) | (scores <= 0)  # what gains nothing never will
            line = scores[fresh].max(initial=-1.0)
            open_rows = np.flatnonzero(~fresh & (scores >= line * TIED))
            if not len(open_rows):
                break
            if len(open_rows) > TOGETHER:
                most = np.argpartition(-scores[open_rows], TOGETHER - 1)[:TOGETHER]
                open_rows = open_rows[most]
            gains = coverage.gains(open_rows)
            scores[open_rows] = gains if weight is None else gains * weight[open_rows]
            seen[open_rows] = step
        best = scores.max()
        row = int((scores >= min(best, best * TIED)).argmax())  # the first of those that tie
        scores[row], taken[row] = -1.0, True
        coverage.choose(row)
    return np.flatnonzero(taken)
