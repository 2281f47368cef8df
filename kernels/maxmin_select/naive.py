"""Plain PyTorch version of :func:`tokencomp.kernels.maxmin_select`."""

import torch
from torch import Tensor

from ..bipartite_match.naive import normalise
from ..segments import starts

# Cosines held at once (fp32: 64 MiB); spans with more rows recompute one row of them per step.
GRAM_ELEMENTS = 1 << 24
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
    gram = unit @ unit.transpose(1, 2) if unit.shape[1] ** 2 <= GRAM_ELEMENTS else None
    span = torch.arange(len(x), device=x.device)
    nearest = x.new_full(x.shape[:2], torch.inf)
    score = torch.empty_like(nearest)
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    order = [start]
    for _ in range(count - 1):
        last = order[-1]
        taken[span, last] = True
        cosine = (unit @ unit[span, last, :, None])[..., 0] if gram is None else gram[span, last]
        torch.minimum(nearest, (1 - cosine).clamp_(min=0), out=nearest)
        if weight is None:
            score.copy_(nearest)
        else:
            torch.mul(nearest, weight, out=score)
        order.append(score.masked_fill_(taken, -1.0).argmax(1))
    return torch.stack(order, dim=1)


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors of ``x - mean``; zero where x is the mean up to rounding."""
    offset = x - mean
    directed = offset.square().sum(-1) > UNDIRECTED * x.square().sum(-1)
    return normalise(offset) * directed[..., None]
