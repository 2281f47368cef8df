"""Plain PyTorch version of :func:`tokencomp.kernels.maxmin_select`."""

import numpy as np
import torch
from tokencomp.kernels.bipartite_match.naive import normalise
from tokencomp.kernels.segments import starts
from torch import Tensor

# Cosines held at once (fp32: 64 MiB).
GRAM_ELEMENTS = 1 << 24
# Spans of up to this many rows find all their cosines at once, equal spans as a batch.
MAX_GRAM_ROWS = 512
# Longer ones go in rounds, each among this many rows, which it may choose all.
ROUND = 256
# Least distance. Cosines of copies differ from 1 by rounding, 6e-7 in fp32 and more where tensor
# cores cut off their sums; it must not rank them. Between copies the weight decides.
EPSILON = 1e-5
# Weight of a chosen row. As no distance is 0, it never has the best score again.
TAKEN = -1.0
# A centred row has no direction if its squared norm is below this share of the uncentred one's:
# what is left of it is rounding. Its cosine is 0 with everything.
UNDIRECTED = 1e-5


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
    margin: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """Rows of `x` in the order chosen, spans one after the other; equal spans run as a batch."""
    first = starts(lengths)
    groups: dict[tuple[int, int], list[int]] = {}
    for span, shape in enumerate(zip(lengths, counts, strict=True)):
        groups.setdefault(shape, []).append(span)
    chosen: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=x.device)] * len(lengths)
    for (length, count), spans in groups.items():
        size = max(1, GRAM_ELEMENTS // max(1, length * length))
        for begin in range(0, len(spans) if count else 0, size):
            members = spans[begin : begin + size]
            rows = torch.tensor([first[s] for s in members], device=x.device)[:, None]
            rows = rows + torch.arange(length, device=x.device)
            weight = None if weights is None else weights[rows]
            which = torch.tensor(members, device=x.device)
            begin_at = None if start is None else start[which]
            least = x.new_zeros(len(members)) if margin is None else margin[which]
            order = _greedy(x[rows], count, weight, centred, least, begin_at)
            for member, picks in zip(members, rows.gather(1, order), strict=True):
                chosen[member] = picks
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=x.device)


def _greedy(
    x: Tensor,
    count: int,
    weight: Tensor | None,
    centred: bool,
    margin: Tensor,
    start: Tensor | None,
) -> Tensor:
    """Choose `count` of the rows of every span; `x` is ``(S, L, D)``; result ``(S, count)``."""
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(1, keepdim=True)
    if start is None:
        far = 1 - (normalise(x) @ normalise(mean).transpose(1, 2)).squeeze(2)
        start = (far if weight is None else weight).argmax(1)
    unit = _centred(x, mean) if centred else normalise(x)
    weight = x.new_ones(x.shape[:2]) if weight is None else weight.to(x.dtype)
    margin = margin.to(x.dtype)
    if x.shape[1] <= MAX_GRAM_ROWS:
        return _at_once(unit, weight, margin, start, count)
    spans = zip(unit, weight, margin, start, strict=True)
    return torch.stack([_Rounds(*span, count).run() for span in spans])


def _at_once(unit: Tensor, weight: Tensor, margin: Tensor, start: Tensor, count: int) -> Tensor:
    """All cosines of every span ``(S, L, D)``, then every step for all spans together.

    Steps run on the host and in NumPy: what each operation costs to start decides.
    """
    distances = _distance(unit @ unit.transpose(1, 2)).cpu().numpy()
    weights, margins = weight.cpu().numpy().copy(), margin.cpu().numpy()[:, None]
    last, spans = start.cpu().numpy(), np.arange(len(unit))
    nearest, scores = np.full_like(weights, np.inf), np.empty_like(weights)
    order = np.empty((count, len(unit)), dtype=np.int64)
    with np.errstate(over="ignore"):
        for step in range(count):
            order[step] = last
            weights[spans, last] = TAKEN
            np.minimum(nearest, distances[spans, last], out=nearest)
            np.multiply(np.add(nearest, margins, out=scores), weights, out=scores)
            last = scores.argmax(1)  # the first of equals
    return torch.from_numpy(order.T.copy()).to(unit.device)


class _Rounds:
    """One long span ``(L, D)``: neither L × L cosines nor steps that read all L rows (ours).

    A row's score against some of the choices bounds its score against all, as scores never rise.
    Rows are brought up to date when their bound is among the best; most never are. While the best
    of ROUND candidates is above the best other row when the round began, the guard, it is the best
    of all, and choosing is a matter of the candidates' own cosines.

    Attributes
    ----------
    order, done, chosen
        Choices, how many of them are made, and their unit vectors, one after the other.
    nearest, seen
        Of every row, the distance from the first `seen` choices.
    """

    def __init__(
        self, unit: Tensor, weight: Tensor, margin: Tensor, start: Tensor, count: int
    ) -> None:
        self.unit, self.weight, self.margin = unit, weight.clone(), margin
        self.order, self.done = start.new_empty(count), 1
        self.order[0] = start
        self.chosen = unit.new_empty(count, unit.shape[1])
        self.chosen[0] = unit[start]
        self.weight[start] = TAKEN
        self.nearest = _distance(unit @ unit[start])
        self.seen = torch.ones_like(self.nearest, dtype=torch.int64)

    def run(self) -> Tensor:
        while self.done < len(self.order):
            best = self.best(ROUND + 1)
            among, guard = best[:-1].sort().values, best[-1]
            bar = float(self.score(guard)), -int(guard)
            unit, nearest = self.unit[among], self.nearest[among].cpu()
            distance, weight = _distance(unit @ unit.T).cpu(), self.weight[among].cpu()
            limit = len(self.order) - self.done
            picks = _round(
                distance, weight, nearest, among.tolist(), float(self.margin), bar, limit
            )
            picked = torch.tensor(picks, device=among.device)
            new, made = among[picked], slice(self.done, self.done + len(picks))
            self.order[made], self.chosen[made], self.done = new, unit[picked], made.stop
            self.nearest[among], self.seen[among] = nearest.to(unit.device), self.done
            self.weight[new] = TAKEN
        return self.order

    def score(self, rows: Tensor) -> Tensor:
        return (self.nearest[rows] + self.margin) * self.weight[rows]

    def best(self, count: int) -> Tensor:
        """The `count` best rows, best first, all up to date."""
        score, reach = (self.nearest + self.margin) * self.weight, count
        while True:
            ranked = score.sort(descending=True, stable=True).indices
            if bool((self.seen[ranked[:count]] == self.done).all()):
                return ranked[:count]
            self.refresh(ranked[:reach])
            score[ranked[:reach]] = self.score(ranked[:reach])
            reach *= 2  # else a front that keeps falling behind would take many sorts

    def refresh(self, rows: Tensor) -> None:
        """Bring `rows` up to date, those that have seen equally many choices together."""
        seen = self.seen[rows]
        for before in seen[seen < self.done].unique().tolist():
            missed = self.chosen[before : self.done]
            for these in rows[seen == before].split(max(1, GRAM_ELEMENTS // len(missed))):
                distance = _distance((self.unit[these] @ missed.T).amax(1))
                self.nearest[these] = torch.minimum(self.nearest[these], distance)
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
    """Choose at most `limit` candidates while the best is above `bar`, a score and minus its row.

    In place, on the host and in NumPy: a pick is four operations on short rows, so that what each
    of them costs to start decides.
    """
    picks: list[int] = []
    distances, weights, near = distance.numpy(), weight.numpy(), nearest.numpy()
    scores = np.empty_like(near)
    with np.errstate(over="ignore"):
        while len(picks) < limit:
            np.multiply(np.add(near, margin, out=scores), weights, out=scores)
            best = int(scores.argmax())  # the first of equals
            if (float(scores[best]), -rows[best]) < bar:
                break
            picks.append(best)
            weights[best] = TAKEN
            np.minimum(near, distances[best], out=near)
    return picks


def mean_distance(x: Tensor, centred: bool) -> Tensor:
    """See :func:`tokencomp.kernels.mean_distance`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
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
    """1 - cos, at least EPSILON; in place."""
    return cosine.neg_().add_(1).clamp_(min=EPSILON)


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors of ``x - mean``; zero where x is the mean up to rounding."""
    offset = x - mean
    return normalise(offset) * _directed(offset.square().sum(-1), x)[..., None]


def _directed(square: Tensor, x: Tensor) -> Tensor:
    """Whether a centred row, of squared norm `square`, is more than the rounding of the row x."""
    return square > UNDIRECTED * x.square().sum(-1)
