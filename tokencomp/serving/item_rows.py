"""Reduces the rows of media items in workers, as planned by `tokencomp.serving.item_plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.weights import merge_rest
from tokencomp.errors import ScoreError
from tokencomp.reducers.base import Reducer, reduced
from tokencomp.serving.item_plan import ItemPlan, built
from tokencomp.serving.offsets import with_offsets
from tokencomp.tokens.tokens import Tokens, VisualSpan


def reduce_item(
    plan: ItemPlan, features: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reduce the features (full, d) of an item.

    Parameters
    ----------
    present : Tensor of int64, shape (entering,), or None
        The tokens that the vision tower has computed, ascending; None: all.

    Returns
    -------
    Tensor, shape (kept, d), or (kept, d + 2) if the plan merges dropped tokens
        Rows for the placeholders, and the digits of their sizes (see `offsets`).
    Tensor of int64, shape (kept,)
        The token of the uncompressed item that each row comes from, ascending.

    Raises
    ------
    ScoreError
        The features are not finite, and the reducer compares them.
    """
    if features.shape[0] != plan.full:
        raise RuntimeError(
            f"the vision tower gave {features.shape[0]} tokens for a planned {plan.full}: "
            "this engine version lays out media in another way than the plan."
        )
    reducer = built(plan.reducer, plan.options, plan.weights)
    rows, sizes, index, start = [], [], [], 0
    for span, keep in plan.counted:
        stop, places = start + span.length, None
        if present is not None:
            places = present[(present >= start) & (present < stop)] - start
        row, size, kept = _reduce_span(
            reducer, features[start:stop], span, keep, places, plan.merge
        )
        rows.append(row)
        sizes.append(size)
        index.append(kept + start)
        start = stop
    x = torch.cat(rows)
    if plan.merge and plan.kept < plan.full:
        x = with_offsets(x, torch.cat(sizes)[None])
    return x, torch.cat(index)


def _reduce_span(
    reducer: Reducer,
    features: Tensor,
    span: VisualSpan,
    keep: int,
    present: Tensor | None,
    merge: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, how many tokens each represents (int64), and the token that each comes from."""
    from tokencomp.kernels.dispatch import exact

    if present is None:
        present = torch.arange(span.length, device=features.device)
    if keep == len(present):
        return features[present], torch.ones_like(present), present
    fixed = span.special_mask(features.device)
    patches, special = present[~fixed[present]], present[fixed[present]]
    tokens = Tokens(
        features[patches], [span.grid], [keep - len(special)], [len(patches)], [span.modality],
        None if len(present) == span.length else ((~fixed).cumsum(0) - 1)[patches],
    )  # fmt: skip
    with exact(features, reducer.traits.batched):
        kept = reduced(reducer, tokens)
        if merge and keep > len(special):
            kept = merge_rest(tokens, kept, [True], reducer.name)
    kept = kept.with_fixed(features, patches, special)
    rows = features[kept.patches] if kept.features is None else kept.features.to(features)
    sizes = torch.ones_like(kept.patches) if kept.weights is None else kept.weights.long()
    return rows, sizes, kept.patches


def reduce_rows(
    plan: ItemPlan,
    x: Tensor,
    width: int,
    report: Callable[[ItemPlan, ScoreError], None],
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the rows (full, d) of an engine by their first `width` columns, as `reduce_item`.

    Features that overflowed (float16 towers) cannot be compared, and an exception would end the
    engine and all requests. Such an item keeps evenly spaced tokens, and `report` gets its plan and
    the error. Non-finite values become 0: they would remain in blocks of the KV cache that later
    requests use. Kept rows (kept, d) keep all columns; digits of sizes follow them.
    """
    try:
        if not torch.isfinite(x if present is None else x[present]).all():
            raise ScoreError("the features of an item are not finite.")
        rows, index = reduce_item(plan, x[:, :width], present)
    except ScoreError as error:
        report(plan, error)
        x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        evenly = replace(plan, reducer="uniform", options="{}", weights="")  # of equal counts
        rows, index = reduce_item(evenly, x[:, :width], present)
    if width == x.shape[1]:
        return rows, index
    return torch.cat([rows[:, :width], x[index, width:], rows[:, width:]], dim=1), index


def batches(sizes: list[int], budget: int, towers: Sequence[Any] = ()) -> Iterator[tuple[int, int]]:
    """Yield ranges of items with at most `budget` uncompressed rows (at least one item each).

    The memory of the tower grows with uncompressed rows. Items with different stages (`towers`)
    cannot share a call of the tower.
    """
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if total and (total + size > budget or (towers and towers[i] != towers[first])):
            yield first, i
            first, total = i, 0
        total += size
    yield first, len(sizes)
