"""Plain PyTorch version of :func:`tokencomp.kernels.maxmin_select`."""

import numpy as np
import torch
from tokencomp.kernels.bipartite_match.naive import normalise
from tokencomp.kernels.segments import starts
from torch import Tensor

# Number of cosines that are in memory at once (64 MiB in fp32).
GRAM_ELEMENTS = 1 << 24
# Spans of up to this many rows compute all their cosines at once, equal spans as a batch.
MAX_GRAM_ROWS = 512
# Longer spans proceed in rounds. A round has this many candidates and may choose all of them.
ROUND = 256
# Smallest distance. The cosine of two copies of a row differs from 1 by rounding: 6e-7 in fp32, and
# more on tensor cores, which truncate their sums. This rounding must not rank copies; the weight
# decides between them.
EPSILON = 1e-5
# Weight of a chosen row. No distance is 0, so its score is negative and never the best again.
TAKEN = -1.0
# A centred row whose squared norm is below this share of the uncentred row's squared norm consists
# of rounding. It has no direction, and its cosine is 0 with every row.
UNDIRECTED = 1e-5


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
    margin: Tensor | None,
    start: Tensor | None,
    metric: str = "cosine",
    isolated: bool = False,
) -> Tensor:
    """Return the chosen rows of `x` in the order of their choice, spans one after the other.

    Spans with the same length and the same number of choices run as a batch. The arguments are
    those of :func:`tokencomp.kernels.maxmin_select` with one entry of `counts` and `lengths` per
    span.
    """
    first_row = starts(lengths)
    groups: dict[tuple[int, int], list[int]] = {}
    for span, shape in enumerate(zip(lengths, counts, strict=True)):
        groups.setdefault(shape, []).append(span)
    chosen: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=x.device)] * len(lengths)
    for (length, count), spans in groups.items():
        size = max(1, GRAM_ELEMENTS // max(1, length * length))
        for begin in range(0, len(spans) if count else 0, size):
            members = spans[begin : begin + size]
            rows = torch.tensor([first_row[s] for s in members], device=x.device)[:, None]
            rows = rows + torch.arange(length, device=x.device)
            weight = None if weights is None else weights[rows]
            member_index = torch.tensor(members, device=x.device)
            first_choice = None if start is None else start[member_index]
            margins = x.new_zeros(len(members)) if margin is None else margin[member_index]
            order = _greedy(
                x[rows], count, weight, centred, margins, first_choice, metric, isolated
            )
            for member, picks in zip(members, rows.gather(1, order), strict=True):
                chosen[member] = picks
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=x.device)


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


def _greedy(
    x: Tensor,
    count: int,
    weight: Tensor | None,
    centred: bool,
    margin: Tensor,
    start: Tensor | None,
    metric: str,
    isolated: bool,
) -> Tensor:
    """Choose `count` rows of every span ``(L, D)`` in `x` ``(S, L, D)``; result ``(S, count)``.

    `weight` is ``(S, L)``, `margin` and `start` are ``(S,)``.
    """
    measure = METRICS[metric]
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(1, keepdim=True)
    rows = x
    if measure is Cosine:
        rows = _centred(x, mean) if centred else normalise(x)
    short = x.shape[1] <= MAX_GRAM_ROWS
    distance = measure.pairs(rows, rows) if short else None
    if isolated:
        start = isolated_row(rows, measure, distance)
    elif start is None:
        if weight is not None:
            start = weight.argmax(1)
        elif measure is Cosine:
            far = 1 - (normalise(x) @ normalise(mean).transpose(1, 2)).squeeze(2)
            start = far.argmax(1)
        else:
            start = (x - mean).square().sum(2).argmax(1)
    weight = x.new_ones(x.shape[:2]) if weight is None else weight.to(x.dtype)
    margin = margin.to(x.dtype)
    if distance is not None:
        return _at_once(distance, weight, margin, start, count)
    spans = zip(rows, weight, margin, start, strict=True)
    return torch.stack([_Rounds(*span, count, measure).run() for span in spans])


def isolated_row(rows: Tensor, measure: Metric, distance: Tensor | None) -> Tensor:
    """The row of every span ``(L, D)`` of `rows` whose nearest other row is farthest, ``(S,)``.

    `distance` ``(S, L, L)`` loses its diagonals, which no later step reads.
    """
    if distance is not None:
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return distance.amin(2).argmax(1)
    length = rows.shape[1]
    nearest = []
    for begin in range(0, length, step := max(1, GRAM_ELEMENTS // (length * len(rows)))):
        part = measure.pairs(rows[:, begin : begin + step], rows)
        at = torch.arange(part.shape[1], device=rows.device)
        part[:, at, at + begin] = torch.inf
        nearest.append(part.amin(2))
    return torch.cat(nearest, dim=1).argmax(1)


def _at_once(distance: Tensor, weight: Tensor, margin: Tensor, start: Tensor, count: int) -> Tensor:
    """Take each step for all spans at once, from the distances ``(S, L, L)`` of their rows.

    The steps run on the host in NumPy. They are many short operations, so their start-up cost
    dominates, and NumPy's is the lowest.
    """
    distances = distance.cpu().numpy()
    weights, margins = weight.cpu().numpy().copy(), margin.cpu().numpy()[:, None]
    last, spans = start.cpu().numpy(), np.arange(len(distances))
    nearest, scores = np.full_like(weights, np.inf), np.empty_like(weights)
    order = np.empty((count, len(distances)), dtype=np.int64)
    with np.errstate(over="ignore"):
        for step in range(count):
            order[step] = last
            weights[spans, last] = TAKEN
            np.minimum(nearest, distances[spans, last], out=nearest)
            np.multiply(np.add(nearest, margins, out=scores), weights, out=scores)
            last = scores.argmax(1)  # returns the first of equal scores
    return torch.from_numpy(order.T.copy()).to(distance.device)


class _Rounds:
    """Selection in one long span ``(L, D)`` without L × L distances or steps that read all rows.

    Scores never rise, so the score of a row against some of the choices is an upper bound of its
    score against all of them. A row is updated only when its bound is among the best, and most rows
    never are. Each round takes the ROUND best rows as candidates; the next best row is the guard.
    As long as the best candidate is above the score that the guard had when the round began, it is
    the best row of all, and only the cosines between candidates are needed. This algorithm is ours.

    Attributes
    ----------
    order
        Chosen rows in the order of their choice, int64 ``(count,)``; valid up to `done`.
    done
        Number of choices so far.
    rows
        The rows as the metric compares them: unit vectors for the cosine.
    chosen
        Those of them that are chosen, ``(count, D)``; valid up to `done`.
    nearest
        Distance of every row to the closest of the first `seen` choices, ``(L,)``.
    seen
        With how many of the choices each row has been compared, int64 ``(L,)``.
    """

    def __init__(
        self,
        rows: Tensor,
        weight: Tensor,
        margin: Tensor,
        start: Tensor,
        count: int,
        measure: Metric,
    ) -> None:
        self.rows, self.weight, self.margin, self.measure = rows, weight.clone(), margin, measure
        self.order, self.done = start.new_empty(count), 1
        self.order[0] = start
        self.chosen = rows.new_empty(count, rows.shape[1])
        self.chosen[0] = rows[start]
        self.weight[start] = TAKEN
        self.nearest = measure.closest(rows, self.chosen[:1])
        self.seen = torch.ones_like(self.nearest, dtype=torch.int64)

    def run(self) -> Tensor:
        """Run rounds until all rows are chosen; return `order`."""
        while self.done < len(self.order):
            best = self.best(ROUND + 1)
            candidates, guard = best[:-1].sort().values, best[-1]
            bar = float(self.score(guard)), -int(guard)
            rows, nearest = self.rows[candidates], self.nearest[candidates].cpu()
            distance, weight = self.measure.pairs(rows, rows).cpu(), self.weight[candidates].cpu()
            limit = len(self.order) - self.done
            picks = _round(
                distance, weight, nearest, candidates.tolist(), float(self.margin), bar, limit
            )
            picked = torch.tensor(picks, device=candidates.device)
            new, place = candidates[picked], slice(self.done, self.done + len(picks))
            self.order[place], self.chosen[place], self.done = new, rows[picked], place.stop
            self.nearest[candidates], self.seen[candidates] = nearest.to(rows.device), self.done
            self.weight[new] = TAKEN
        return self.order

    def score(self, rows: Tensor) -> Tensor:
        """Return the scores of `rows`, which are upper bounds where rows are not up to date."""
        return (self.nearest[rows] + self.margin) * self.weight[rows]

    def best(self, count: int) -> Tensor:
        """Return the `count` best rows, best first, all of them up to date.

        The rows with the best bounds are updated, which can only lower their scores, until the best
        `count` rows are all up to date. The others then have lower bounds, hence lower scores.
        """
        score, reach = (self.nearest + self.margin) * self.weight, count
        while True:
            ranked = score.sort(descending=True, stable=True).indices
            if bool((self.seen[ranked[:count]] == self.done).all()):
                return ranked[:count]
            self.refresh(ranked[:reach])
            score[ranked[:reach]] = self.score(ranked[:reach])
            reach *= 2  # without doubling, bounds that keep falling would take many sorts

    def refresh(self, rows: Tensor) -> None:
        """Compare `rows` with the choices that they have not seen, equal numbers together."""
        seen = self.seen[rows]
        for already_seen in seen[seen < self.done].unique().tolist():
            unseen = self.chosen[already_seen : self.done]
            for part in rows[seen == already_seen].split(max(1, GRAM_ELEMENTS // len(unseen))):
                distance = self.measure.closest(self.rows[part], unseen)
                self.nearest[part] = torch.minimum(self.nearest[part], distance)
        self.seen[rows] = self.done


def _round(
    distance: Tensor,
    weight: Tensor,
    nearest: Tensor,
    rows: list[int],
    margin: float,
    bar: tuple[float, int],
    limit: int,
) -> list[int]:
    """Choose at most `limit` candidates while the best of them is above `bar`.

    `bar` is the guard's score and minus its row, so that a tie goes to the lower row. `weight` and
    `nearest` change in place. The steps run on the host in NumPy: a choice is four operations on
    short rows, whose start-up cost dominates.
    """
    picks: list[int] = []
    distances, weights, near = distance.numpy(), weight.numpy(), nearest.numpy()
    scores = np.empty_like(near)
    with np.errstate(over="ignore"):
        while len(picks) < limit:
            np.multiply(np.add(near, margin, out=scores), weights, out=scores)
            best = int(scores.argmax())  # returns the first of equal scores
            if (float(scores[best]), -rows[best]) < bar:
                break
            picks.append(best)
            weights[best] = TAKEN
            np.minimum(near, distances[best], out=near)
    return picks


def mean_distance(x: Tensor, lengths: list[int], centred: bool) -> Tensor:
    """See :func:`tokencomp.kernels.mean_distance`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not lengths:
        return x.new_zeros(0, dtype=dtype)
    return torch.cat([_mean_distance(span, centred, dtype) for span in x.split(lengths)])


def _mean_distance(x: Tensor, centred: bool, dtype: torch.dtype) -> Tensor:
    """The mean distance of one span, ``(1,)``."""
    total = x.new_zeros(x.shape[1], dtype=dtype)
    mean = x.mean(0, dtype=dtype) if centred else total
    for part in x.split(max(1, GRAM_ELEMENTS // max(1, x.shape[1]))):
        wide = part.to(dtype)
        rows = wide - mean if centred else wide
        norm = rows.norm(dim=1)
        inverse = 1 / norm.clamp(min=torch.finfo(dtype).tiny)
        if centred:
            inverse = inverse * _directed(norm.square(), wide)
        total = total + inverse @ rows
    return (1 - (total / max(1, len(x))).square().sum(0, keepdim=True)).clamp_(min=0)


def _distance(cosine: Tensor) -> Tensor:
    """Turn cosines into distances 1 - cos of at least EPSILON, in place."""
    return cosine.neg_().add_(1).clamp_(min=EPSILON)


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """Return the unit vectors of ``x - mean``, zero where x equals the mean up to rounding."""
    offset = x - mean
    return normalise(offset) * _directed(offset.square().sum(-1), x)[..., None]


def _directed(square: Tensor, x: Tensor) -> Tensor:
    """Whether a centred row with squared norm `square` is more than the rounding error of `x`."""
    return square > UNDIRECTED * x.square().sum(-1)
