"""Merging of the patches that a stage does not keep into those that it keeps (`merge=True`)."""

from __future__ import annotations

from collections.abc import Sequence

from tokencomp.errors import OptionError
from tokencomp.tokens.nearest import LOST, nearest
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch


def merge_rest(
    batch: SpanBatch,
    reduction: Reduction,
    keeps: Sequence[int],
    merging: Sequence[bool],
    reducer: str,
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
    merging
        Of every span, whether its patches are merged. The others are dropped.
    reducer
        The name of the reducer that has chosen them, for the message.
    """
    from tokencomp.kernels import merge_rows

    if reduction.merged is not None or reduction.sizes is not None:
        raise OptionError(
            f"merge=True: {reducer!r} returns features or sizes of its own, so there are no "
            "tokens left to merge. Leave merge out; a reducer that merges should say so "
            "(`merges = True`)."
        )
    patches = Patches.of(batch, keeps)
    if not any(patches.budgets):
        return reduction
    chosen = patches.numbers(reduction.keep)
    x = patches.features
    target = nearest(patches, x, chosen, patches.budgets)
    if not all(merging):
        target = target.where(patches.per_patch([*map(int, merging)]).bool(), LOST)
    target = target.index_copy(0, chosen, chosen)
    merged = merge_rows(x, target, chosen, patches.sizes())
    return patches.replaced(chosen, merged.x, merged.sizes.float())
