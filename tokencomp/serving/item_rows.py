"""Reduces the rows of media items in workers, as planned by `tokencomp.serving.item_plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import ScoreError
from tokencomp.reducers.choice import Cut, Patches, choose_patches
from tokencomp.serving.item_plan import ItemPlan
from tokencomp.serving.offsets import with_offsets


def reduce_item(
    plan: ItemPlan, features: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reduce the features (full, d) of an item to rows (kept, d), and their indices (kept,).

    `present` (entering,), int64 and ascending, are the tokens that the vision tower has computed;
    None: all. Rows have two more columns, the digits of their sizes (see `offsets`), if the plan
    merges dropped tokens. Indices, ascending, are those of tokens of the uncompressed item. Raises
    `ScoreError` if the features are not finite, and the reducer compares them.
    """
    if features.shape[0] != plan.full:
        raise RuntimeError(
            f"the vision tower gave {features.shape[0]} tokens for a planned {plan.full}: "
            "this engine version lays out media in another way than the plan."
        )
    counts = [span.length for span in plan.spans]
    if present is not None:
        features = features[present]
        ends = torch.tensor(np.cumsum(counts), device=present.device)
        counts = np.diff(torch.searchsorted(present, ends).tolist(), prepend=0).tolist()
    cuts = [
        Cut.of(span, count, keep, plan.fraction)
        for span, count, keep in zip(plan.spans, counts, plan.keep, strict=True)
    ]
    kept = choose_patches(Patches.of(cuts, features, present), plan.stage)
    index = kept.patches if present is None else present[kept.patches]
    x = features[kept.patches] if kept.features is None else kept.features.to(features)
    if plan.merge and plan.kept < plan.full:
        sizes = torch.ones_like(index) if kept.weights is None else kept.weights.long()
        x = with_offsets(x, sizes[None])
    return x, index


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
