"""Plain PyTorch version of :func:`tokencomp.kernels.maxmin_select`."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from tokencomp.kernels.bipartite_match import normalise
from tokencomp.kernels.maxmin_select.rounds import EPSILON, GRAM_ELEMENTS, TAKEN, TIED, Rounds
from torch import Tensor

# Spans of up to this many rows compute all their cosines at once, equal spans as a batch.
MAX_GRAM_ROWS = 512


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


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    margin: Tensor | None,
    start: Tensor | None,
    metric: str,
    isolated: bool,
    bonus: Tensor | None,
    given: Tensor | None,
) -> Tensor:
    """Return the chosen rows of `x` in the order of their choice, spans one after the other.

    Spans with the same length and the same number of choices run as a batch. The arguments are
    those of :func:`tokencomp.kernels.maxmin_select` with one entry of `counts` and `lengths` per
    span.
    """
    first_row, first_pick = ([*accumulate(n, initial=0)] for n in (lengths, counts))
    if start is not None and given is not None:
        start = read_starts(start, given, counts)
    chosen: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=x.device)] * len(lengths)
    shapes = [*zip(lengths, counts, strict=True)]
    for length, count in dict.fromkeys(shapes):
        spans = [span for span, shape in enumerate(shapes) if shape == (length, count)]
        size = max(1, GRAM_ELEMENTS // max(1, length * length))
        for begin in range(0, len(spans) if count else 0, size):
            members = spans[begin : begin + size]
            rows = torch.tensor([first_row[s] for s in members], device=x.device)[:, None]
            rows = rows + torch.arange(length, device=x.device)
            weight = None if weights is None else weights[rows]
            extra = None if bonus is None else bonus[rows]
            member_index = torch.tensor(members, device=x.device)
            first = None
            if start is not None and given is None:
                first = First(start[member_index][:, None])
            elif start is not None and given is not None:
                places = torch.tensor([first_pick[s] for s in members], device=x.device)[:, None]
                own = start[places + torch.arange(count, device=x.device)]
                first = First(own, given[member_index])
            margins = x.new_zeros(len(members)) if margin is None else margin[member_index]
            order = _greedy(x[rows], count, weight, margins, first, metric, isolated, extra)
            for member, picks in zip(members, rows.gather(1, order), strict=True):
                chosen[member] = picks
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=x.device)


def read_starts(start: Tensor, given: Tensor, counts: list[int]) -> Tensor:
    """First choices ``(Σ counts,)`` with 0 after the `given` ones of every span."""
    place = torch.cat([torch.arange(count) for count in counts] or [torch.arange(0)])
    count = torch.tensor(counts, device=start.device)
    return start.masked_fill(place.to(start.device) >= given.repeat_interleave(count), 0)


class First(NamedTuple):
    """First choices of spans: rows ``(S, m)``, and how many of them count, ``(S,)``; None: all."""

    rows: Tensor
    given: Tensor | None = None

    def of_span(self, span: int) -> Tensor:
        """The first choices of one span."""
        return self.rows[span] if self.given is None else self.rows[span, : int(self.given[span])]


def _greedy(
    x: Tensor,
    count: int,
    weight: Tensor | None,
    margin: Tensor,
    first: First | None,
    metric: str,
    isolated: bool,
    bonus: Tensor | None,
) -> Tensor:
    """Choose `count` rows of every span ``(L, D)`` in `x` ``(S, L, D)``; result ``(S, count)``.

    `weight` and `bonus` are ``(S, L)``, `margin` is ``(S,)``.
    """
    measure = METRICS[metric]
    x = x if x.dtype == torch.float64 else x.float()
    rows = normalise(x) if measure is Cosine else x
    short = x.shape[1] <= MAX_GRAM_ROWS
    distance = measure.pairs(rows, rows) if short else None
    if isolated:
        first = First(isolated_row(rows, measure, distance)[:, None])
    elif first is None:
        if bonus is not None:
            start = first_best(bonus)
        elif weight is not None:
            start = weight.argmax(1)
        elif measure is Cosine:
            mean = normalise(x.mean(1, keepdim=True))
            start = first_best(1 - (rows @ mean.mT).squeeze(2))
        else:
            start = first_best((x - x.mean(1, keepdim=True)).square().sum(2))
        first = First(start[:, None])
    weight = x.new_ones(x.shape[:2]) if weight is None else weight.to(x.dtype)
    bonus = torch.zeros_like(weight) if bonus is None else bonus.to(x.dtype)
    margin = margin.to(x.dtype)
    if distance is not None:
        return _at_once(distance, weight, margin, first, count, bonus)
    starts_of = [first.of_span(span) for span in range(len(rows))]
    spans = zip(rows, weight, margin, starts_of, bonus, strict=True)
    return torch.stack([Rounds(*span, count, measure).run() for span in spans])


def isolated_row(rows: Tensor, measure: Metric, distance: Tensor | None) -> Tensor:
    """The row of every span ``(L, D)`` of `rows` whose nearest other row is farthest, ``(S,)``.

    `distance` ``(S, L, L)`` loses its diagonals, which no later step reads.
    """
    if distance is not None:
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return first_best(distance.amin(2))
    length = rows.shape[1]
    nearest = []
    for begin in range(0, length, step := max(1, GRAM_ELEMENTS // (length * len(rows)))):
        part = measure.pairs(rows[:, begin : begin + step], rows)
        at = torch.arange(part.shape[1], device=rows.device)
        part[:, at, at + begin] = torch.inf
        nearest.append(part.amin(2))
    return first_best(torch.cat(nearest, dim=1))


def _at_once(
    distance: Tensor, weight: Tensor, margin: Tensor, first: First, count: int, bonus: Tensor
) -> Tensor:
    """Take each step for all spans at once, from the distances ``(S, L, L)`` of their rows.

    The steps run on the host in NumPy. They are many short operations, so their start-up cost
    dominates, and NumPy's is the lowest.
    """
    distances = distance.cpu().numpy()
    weights, margins = weight.cpu().numpy().copy(), margin.cpu().numpy()[:, None]
    extra, starts_of = bonus.cpu().numpy().copy(), first.rows.cpu().numpy()
    given = None if first.given is None else first.given.cpu().numpy()
    most = 1 if given is None else int(given.max())
    last, spans = starts_of[:, 0], np.arange(len(distances))
    nearest, scores = np.full_like(weights, np.inf), np.empty_like(weights)
    order = np.empty((count, len(distances)), dtype=np.int64)
    with np.errstate(over="ignore"):
        for step in range(count):
            order[step] = last
            weights[spans, last], extra[spans, last] = TAKEN, 0.0
            np.minimum(nearest, distances[spans, last], out=nearest)
            np.multiply(np.add(nearest, margins, out=scores), weights, out=scores)
            np.add(scores, extra, out=scores)
            last = (scores >= scores.max(1, keepdims=True) * TIED).argmax(1)  # the first of them
            if given is not None and step + 1 < most:
                last = np.where(step + 1 < given, starts_of[:, step + 1], last)
    return torch.from_numpy(order.T.copy()).to(distance.device)


def mean_distance(x: Tensor, lengths: list[int]) -> Tensor:
    """See :func:`tokencomp.kernels.mean_distance`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not lengths:
        return x.new_zeros(0, dtype=dtype)
    return torch.cat([_mean_distance(span, dtype) for span in x.split(lengths)])


def _mean_distance(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean distance of one span, ``(1,)``."""
    total = x.new_zeros(x.shape[1], dtype=dtype)
    for part in x.split(max(1, GRAM_ELEMENTS // max(1, x.shape[1]))):
        rows = part.to(dtype)
        norm = rows.norm(dim=1)
        inverse = 1 / norm.clamp(min=torch.finfo(dtype).tiny)
        total = total + inverse @ rows
    return (1 - (total / max(1, len(x))).square().sum(0, keepdim=True)).clamp_(min=0)
