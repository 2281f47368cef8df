"""Merging of the patches that a reducer drops into those that it keeps."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers._batch import Patches, by_group
from tokencomp.tokens.reduction import Reduction

BLOCK = 1 << 24  # cosines computed at once


def merge_dropped(patches: Patches, chosen: Tensor, floor: float) -> Reduction:
    """Merge every dropped patch into the nearest kept one of its span.

    Kept patches become means, weighted by the number of tokens that patches already stand for.
    Spans of as many patches and budgets are compared together.

    Parameters
    ----------
    chosen : Tensor of int64, shape (k,)
        Patches that stay, ascending: of every span as many as its budget.
    floor
        Smallest cosine at which a dropped patch is merged; below it the patch is lost.
    """
    from tokencomp.kernels import merge_rows

    firsts = list(itertools.accumulate(patches.budgets, initial=0))
    x, starts = patches.features, patches.starts

    def nearest(members: list[int], rows: Tensor) -> Tensor:
        """The kept patch that every patch of these spans merges into, or -1."""
        budget = patches.budgets[members[0]]
        own = chosen
        if len(members) < len(patches.lengths):
            places = [np.arange(firsts[m], firsts[m] + budget) for m in members]
            own = chosen.index_select(0, patches.table(np.concatenate(places)))
        own = own.view(len(members), budget)
        places_in_span = own - patches.table([starts[m] for m in members])[:, None]
        features = rows.float().view(len(members), -1, rows.shape[1])
        return _nearest(features, own, places_in_span, floor).flatten()

    groups = list(zip(patches.lengths, patches.budgets, strict=True))
    target = by_group(patches, groups, x, nearest)
    target = target.index_copy(0, chosen, chosen)
    merged = merge_rows(x, target, chosen, patches.sizes())
    return patches.replaced(chosen, merged.x, merged.sizes.float())


def _nearest(x: Tensor, kept: Tensor, places: Tensor, floor: float) -> Tensor:
    """Numbers of the nearest kept patches, (spans, n); -1 where the cosine is below `floor`.

    Parameters
    ----------
    x : Tensor of float32, shape (spans, n, d)
    kept, places : Tensor of int64, shape (spans, k)
        Numbers of the kept patches in the batch, and in their span.
    """
    unit = torch.nn.functional.normalize(x, dim=2)
    others = unit.gather(1, places[:, :, None].expand(-1, -1, x.shape[2])).mT
    step = max(1, BLOCK // kept.numel())
    blocks = [(unit[:, at : at + step] @ others).max(2) for at in range(0, x.shape[1], step)]
    best, nearest = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
    return torch.where(best >= floor, kept.gather(1, nearest), -1)
