"""Outputs of full length: rows and attention maps spread over the columns of the caller's batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokencomp.engine.layout import RowLayout


def restore(x: Tensor, layout: RowLayout, width: int) -> Tensor:
    """Spread rows of x over the columns of the caller's batch.

    A column that is gone repeats the last row before it: what follows was predicted from that row,
    so a label right behind a dropped token still trains. Zeros where there is none.

    Parameters
    ----------
    x : Tensor, shape (B, layout.width, d)
    width
        Columns of the caller's batch.

    Returns
    -------
    Tensor, shape (B, width, d)
    """
    if layout.origin is None:
        return x
    columns, rows = torch.arange(width, device=x.device), []
    for b, length in enumerate(layout.lengths):
        origin = layout.origin[b, layout.width - length :].to(x.device)
        before = torch.searchsorted(origin, columns, right=True)
        own = nn.functional.pad(x[b, layout.width - length :], (0, 0, 1, 0))
        rows.append(own[before])
    return torch.stack(rows)


def restore_map(
    weights: Tensor, layout: RowLayout, width: int, past: Tensor | None, past_width: int
) -> Tensor:
    """Spread an attention map over the columns of the caller's batch.

    A key that is gone has weight 0. A query that is gone repeats the last row before it, as
    `restore` does with hidden states.

    Parameters
    ----------
    weights : Tensor, shape (B, H, layout.width, rows of earlier calls + layout.width)
    width
        Columns of this call in the caller's batch.
    past : Tensor of int64, shape (B, rows of earlier calls), or None
        Column of every row that the cache held before this call; None: nothing had left.
    past_width
        Columns of the earlier calls.

    Returns
    -------
    Tensor, shape (B, H, width, past_width + width)
    """
    batch, heads, queries, keys = weights.shape
    if layout.origin is None and past is None:
        return weights
    device = weights.device
    own = layout.origin
    if own is None:
        own = torch.arange(width, device=device).expand(batch, -1)
    if past is None:
        past = torch.arange(keys - queries, device=device).expand(batch, -1)
    columns = torch.cat([past.to(device), own.to(device) + past_width], dim=1)
    # Several padding rows may name one column; their weights are 0, so they add nothing.
    full = weights.new_zeros(batch, heads, queries, past_width + width)
    full = full.scatter_add(-1, columns[:, None, None].expand_as(weights), weights)
    rows = restore(full.transpose(1, 2).flatten(2), layout, width)
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


def cached_columns(
    columns: Tensor | None, rows: int, dropped: int, batch: int, device: torch.device
) -> Tensor | None:
    """Column of every row that a cache layer holds, shape (B, rows).

    Parameters
    ----------
    columns : Tensor of int64, shape (B, m), m ≤ rows, or None
        Of the first rows, see `CompressedLayer.columns`.
    rows, dropped
        Rows that the layer holds, and columns that it does not.
    """
    if not dropped or columns is None:
        return None
    later = torch.arange(columns.shape[1], rows, device=device) + dropped
    return torch.cat([columns.to(device), later.expand(batch, -1)], dim=1)
