"""Plain PyTorch version of :func:`tokencomp.kernels.dpp_select`."""

import torch
from tokencomp.kernels.checks import same_shape, starts
from torch import Tensor

# A row that adds less than this share of its own relevance lies in the span of the chosen ones.
EPSILON = 1e-6


def dpp_select(unit: Tensor, counts: list[int], relevance: Tensor, lengths: list[int]) -> Tensor:
    """Return the chosen rows in ascending order; equal spans take their steps as a batch."""
    first = starts(lengths)
    chosen = [torch.empty(0, dtype=torch.int64, device=unit.device)]
    for (length, count), spans in same_shape(lengths, counts).items():
        if not count:
            continue
        rows = torch.tensor([first[s] for s in spans], device=unit.device)[:, None]
        rows = rows + torch.arange(length, device=unit.device)
        order = _greedy(unit[rows], relevance[rows], count)
        chosen.append(rows.gather(1, order).flatten())
    return torch.cat(chosen).sort().values


def _greedy(unit: Tensor, r: Tensor, count: int) -> Tensor:
    """Choose `count` rows of every span of unit ``(S, L, D)``, r ``(S, L)``; ``(S, count)``."""
    spans, length = r.shape
    gain, least = r * r, EPSILON * r * r
    factors = unit.new_zeros(spans, count, length)
    chosen = torch.empty(spans, count, dtype=torch.int64, device=unit.device)
    taken = torch.zeros_like(r, dtype=torch.bool)
    for i in range(count):
        # Directions that are used up rank below all others, by relevance.
        score = torch.where(gain > least, gain, r - 2.0).masked_fill(taken, -torch.inf)
        best = score.argmax(1, keepdim=True)
        chosen[:, i] = best[:, 0]
        taken.scatter_(1, best, True)
        own, left = r.gather(1, best), gain.gather(1, best)
        row = unit.gather(1, best[..., None].expand(-1, -1, unit.shape[2]))
        cosine = (unit @ row.mT)[..., 0]
        before = factors[:, :i].gather(2, best[:, None].expand(-1, i, -1))
        row = own * r * cosine - (before.mT @ factors[:, :i])[:, 0]
        fresh = left > EPSILON * own**2
        factors[:, i] = torch.where(fresh, row / left.clamp(min=1e-20).sqrt(), 0.0)
        gain = gain - factors[:, i] ** 2
    return chosen
