"""Merging of the patches that a stage does not keep into those that it keeps (`rest="merge"`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import OptionError
from tokencomp.tokens.patches import Patches, by_group
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch

BLOCK = 1 << 24  # cosines computed at once
LOST = -1  # target of patches of a span that keeps none


def merge_rest(
    batch: SpanBatch, reduction: Reduction, keeps: Sequence[int], reducer: str
) -> Reduction:
    """Merge every patch that leaves into the nearest patch of its span that stays.

    Near is what has a large cosine. Kept patches become means, weighted by the number of tokens
    that patches already stand for. Special tokens and text between frames stay as they are. Where
    no patch of a span stays, its patches are dropped.

    Parameters
    ----------
    reduction
        What stays of `batch`: rows alone.
    keeps
        Tokens that stay of every span, special ones included.
    reducer
        The name of the reducer that has chosen them.

    Raises
    ------
    OptionError
        The reducer has returned features or sizes of its own.
    """
    from tokencomp.kernels import merge_rows

    if reduction.merged is not None or reduction.sizes is not None:
        raise OptionError(
            f"rest='merge': {reducer!r} returns features or sizes of its own, so there are no "
            "tokens left to merge. Leave rest out; a reducer that merges should say so "
            "(`merges = True`)."
        )
    patches = Patches.of(batch, keeps)
    if not any(patches.budgets):
        return reduction
    chosen = patches.numbers(reduction.keep)
    target = nearest_kept(patches, chosen).index_copy(0, chosen, chosen)
    merged = merge_rows(patches.features, target, chosen, patches.sizes())
    return patches.replaced(chosen, merged.x, merged.sizes.float())


def nearest_kept(patches: Patches, chosen: Tensor) -> Tensor:
    """The kept patch of the same span that is nearest to every patch, int64, (patches,).

    Spans of as many patches and budgets are compared together.

    Parameters
    ----------
    chosen : Tensor of int64, shape (k,)
        Patches that stay, ascending: of every span as many as its budget.
    """
    starts, firsts = patches.starts, list(itertools.accumulate(patches.budgets, initial=0))

    def nearest(members: list[int], rows: Tensor) -> Tensor:
        budget = patches.budgets[members[0]]
        if not budget:
            return torch.full((len(rows),), LOST, device=rows.device)
        own = chosen
        if len(members) < len(patches.lengths):
            places = [np.arange(firsts[m], firsts[m] + budget) for m in members]
            own = chosen.index_select(0, patches.table(np.concatenate(places)))
        own = own.view(len(members), budget)
        in_span = own - patches.table([starts[m] for m in members])[:, None]
        features = rows.float().view(len(members), -1, rows.shape[1])
        return _nearest(features, own, in_span).flatten()

    groups = list(zip(patches.lengths, patches.budgets, strict=True))
    return by_group(patches, groups, patches.features, nearest)


def _nearest(x: Tensor, kept: Tensor, in_span: Tensor) -> Tensor:
    """Numbers of the nearest kept patches, (spans, n).

    Parameters
    ----------
    x : Tensor of float32, shape (spans, n, d)
    kept, in_span : Tensor of int64, shape (spans, k)
        Numbers of the kept patches in the batch, and in their span.
    """
    unit = torch.nn.functional.normalize(x, dim=2)
    others = unit.gather(1, in_span[:, :, None].expand(-1, -1, x.shape[2])).mT
    step = max(1, BLOCK // kept.numel())
    blocks = [(unit[:, at : at + step] @ others).argmax(2) for at in range(0, x.shape[1], step)]
    return kept.gather(1, torch.cat(blocks, 1))
