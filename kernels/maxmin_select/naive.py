"""Plain PyTorch version of :func:`tokencomp.kernels.maxmin_select`."""

import torch
from torch import Tensor

from ..bipartite_match.naive import normalise
from ..segments import starts

# Cosines held at once (fp32: 64 MiB).
GRAM_ELEMENTS = 1 << 24
# Rows whose cosines are found together where not all are needed: enough for a fast product, few
# enough that most of the rows are chosen before they are out of date.
BLOCK = 64
# A centred row has no direction if its squared norm is below this share of the uncentred one's:
# what is left of it is rounding. Its cosine is 0 with everything.
UNDIRECTED = 1e-5


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
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
            begin_at = None if start is None else start[torch.tensor(members, device=x.device)]
            order = _greedy(x[rows], count, weight, centred, begin_at)
            for member, picks in zip(members, rows.gather(1, order), strict=True):
                chosen[member] = picks
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=x.device)


def _greedy(
    x: Tensor, count: int, weight: Tensor | None, centred: bool, start: Tensor | None
) -> Tensor:
    """Choose `count` of the rows of every span; `x` is ``(S, L, D)``; result ``(S, count)``."""
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(1, keepdim=True)
    if start is None:
        far = 1 - (normalise(x) @ normalise(mean).transpose(1, 2)).squeeze(2)
        start = (far if weight is None else weight).argmax(1)
    unit = _centred(x, mean) if centred else normalise(x)
    rows = Cosines(unit, count)
    span = torch.arange(len(x), device=x.device)
    nearest = x.new_full(x.shape[:2], torch.inf)
    score = torch.zeros_like(nearest) if weight is None else weight.to(nearest.dtype, copy=True)
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    order = [start]
    for _ in range(count - 1):
        last = order[-1]
        taken[span, last] = True
        torch.minimum(nearest, (1 - rows.of(last, score)).clamp_(min=0), out=nearest)
        if weight is None:
            score.copy_(nearest)
        else:
            torch.mul(nearest, weight, out=score)
        order.append(score.masked_fill_(taken, -1.0).argmax(1))
    return torch.stack(order, dim=1)


class Cosines:
    """Rows of the cosine matrix of every span of `unit` (S, L, D), found when they are needed.

    All at once if many will be; else in blocks of those that are likely to be chosen next.
    """

    def __init__(self, unit: Tensor, count: int) -> None:
        length = unit.shape[1]
        self.unit, self.span = unit, torch.arange(len(unit), device=unit.device)
        self.whole = length <= BLOCK or (3 * count > length and length**2 <= GRAM_ELEMENTS)
        self.block = unit @ unit.transpose(1, 2) if self.whole else unit[:, :0]
        self.place = unit.new_full(unit.shape[:2], -1, dtype=torch.int64)

    def of(self, last: Tensor, score: Tensor) -> Tensor:
        """Cosines (S, L) of row `last` (S,) of every span; rows of high `score` come next."""
        if self.whole:
            return self.block[self.span, last]
        if (self.place[self.span, last] < 0).any():
            likely = score.index_put((self.span, last), score.new_tensor(torch.inf))
            members = likely.topk(BLOCK, dim=1).indices
            slots = torch.arange(BLOCK, device=members.device).expand_as(members)
            self.place.fill_(-1).scatter_(1, members, slots)
            self.block = self.unit[self.span[:, None], members] @ self.unit.transpose(1, 2)
        return self.block[self.span, self.place[self.span, last]]


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors of ``x - mean``; zero where x is the mean up to rounding."""
    offset = x - mean
    directed = offset.square().sum(-1) > UNDIRECTED * x.square().sum(-1)
    return normalise(offset) * directed[..., None]
