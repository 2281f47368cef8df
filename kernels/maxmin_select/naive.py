"""Plain PyTorch version of :func:`tokencomp.kernels.maxmin_select`."""

import torch
from torch import Tensor

from ..bipartite_match.naive import normalise
from ..segments import starts

# Cosines held at once (fp32: 64 MiB).
GRAM_ELEMENTS = 1 << 24
# Spans of up to this many rows find all their cosines at once, equal spans as a batch.
MAX_GRAM_ROWS = 1024
# Longer ones go in rounds, each of at most ROUND choices among one row in SHARE, at least ROUND.
ROUND, SHARE = 256, 16
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
    return torch.stack([_in_rounds(*span, count) for span in spans])


def _at_once(unit: Tensor, weight: Tensor, margin: Tensor, start: Tensor, count: int) -> Tensor:
    """All cosines of every span ``(S, L, D)``, then every step for all spans together."""
    cosine = unit @ unit.transpose(1, 2)
    span = torch.arange(len(unit), device=unit.device)
    nearest, weight = torch.full_like(weight, torch.inf), weight.clone()
    order = [start]
    for _ in range(count - 1):
        last = order[-1]
        weight[span, last] = TAKEN
        torch.minimum(nearest, _distance(cosine[span, last]), out=nearest)
        order.append(((nearest + margin[:, None]) * weight).argmax(1))
    return torch.stack(order, dim=1)


def _in_rounds(unit: Tensor, weight: Tensor, margin: Tensor, start: Tensor, count: int) -> Tensor:
    """One long span ``(L, D)``: neither L × L cosines nor steps that read all L rows (ours).

    Scores never rise. While the best of a few candidates is above what the best other row, the
    guard, was when the round began, it is the best of all, so that only candidates are kept up to
    date. When it no longer is, one matrix product brings the round's picks to every row.
    """
    size = max(ROUND, len(unit) // SHARE)
    nearest, weight = torch.full_like(weight, torch.inf), weight.clone()
    order = new = start[None]
    while True:
        weight[new] = TAKEN
        torch.minimum(nearest, _distance((unit @ unit[new].T).amax(1)), out=nearest)
        if len(order) == count:
            return order
        score = (nearest + margin) * weight
        ranked = score.sort(descending=True, stable=True).indices[: size + 1]
        among, guard = ranked[:-1].sort().values, ranked[-1]
        bar = float(score[guard]), -int(guard)
        limit = min(ROUND, count - len(order))
        state = unit[among].cpu(), weight[among].cpu(), nearest[among].cpu()
        picks = _round(*state, among.tolist(), float(margin), bar, limit)
        new = among[torch.tensor(picks, device=among.device)]
        order = torch.cat([order, new])


def _round(
    unit: Tensor,
    weight: Tensor,
    nearest: Tensor,
    rows: list[int],
    margin: float,
    bar: tuple[float, int],
    limit: int,
) -> list[int]:
    """Choose among candidates while the best is above `bar`, a score and minus its row.

    On the host, and in place: a pick is a few operations on short rows, so that what each of them
    costs to start decides.
    """
    picks: list[int] = []
    score, cosine = torch.empty_like(nearest), torch.empty_like(nearest)
    scores, weights = score.numpy(), weight.numpy()  # the same memory
    while len(picks) < limit:
        torch.add(nearest, margin, out=score).mul_(weight)
        best = int(scores.argmax())  # the first of equals
        if (float(scores[best]), -rows[best]) < bar:
            break
        picks.append(best)
        weights[best] = TAKEN
        torch.mv(unit, unit[best], out=cosine)
        torch.minimum(nearest, _distance(cosine), out=nearest)
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
