"""Distances that max-min selection can use, in plain PyTorch."""

import torch
from torch import Tensor

# Smallest distance. The cosine of two copies of a row differs from 1 by rounding: 6e-7 in fp32, and
# more on tensor cores, which truncate their sums. This rounding must not rank copies; the weight
# decides between them.
EPSILON = 1e-5
# Scores of at least this share of the best one are ties with it. The last bits of features differ
# between batches of another shape, and must not decide between rows that are equally far.
TIED = 1 - 4e-6


class Cosine:
    """Distances 1 - cos of rows that are unit vectors."""

    @staticmethod
    def pairs(a: Tensor, b: Tensor) -> Tensor:
        """Distances of every row of `a` ``(…, n, D)`` from every row of `b` ``(…, m, D)``."""
        return _distance(a @ b.mT)

    @staticmethod
    def closest(a: Tensor, b: Tensor) -> Tensor:
        """Distance of every row of `a` ``(n, D)`` from the closest row of `b` ``(m, D)``."""
        return _distance((a @ b.T).amax(1))


class RootMeanSquare:
    """Root mean squares of the differences of rows.

    The differences themselves are squared. A matrix product would be faster, but it subtracts
    squared norms from each other, and what remains for two copies of a row is their rounding error.
    """

    @staticmethod
    def pairs(a: Tensor, b: Tensor) -> Tensor:
        """See `Cosine.pairs`."""
        mode = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(a, b, compute_mode=mode) / max(1, a.shape[-1]) ** 0.5
        return distance.clamp_(min=EPSILON)

    @classmethod
    def closest(cls, a: Tensor, b: Tensor) -> Tensor:
        """See `Cosine.closest`."""
        return cls.pairs(a, b).amin(1)


Metric = type[Cosine] | type[RootMeanSquare]
METRICS: dict[str, Metric] = {"cosine": Cosine, "rms": RootMeanSquare}


def first_best(scores: Tensor) -> Tensor:
    """Index of the first of the scores ``(…, n)`` that tie with the best, ``(…)``."""
    best = scores.amax(-1, keepdim=True)
    return (scores >= torch.minimum(best, best * TIED)).int().argmax(-1)


def _distance(cosine: Tensor) -> Tensor:
    """Turn cosines into distances 1 - cos of at least EPSILON, in place."""
    return cosine.neg_().add_(1).clamp_(min=EPSILON)
