"""Pure tensor code: which columns stay, and moving everything that has a sequence axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.rows.layout import KeptSpan, PromptColumns, RowLayout
from tokencomp.tokens.reduction import Reduction


@dataclass
class Selection:
    """Which of the live visual tokens of a call stay.

    Attributes
    ----------
    counts
        Per sample, per span: tokens that stay.
    chosen
        (sample, span) of the spans that lose tokens but not all of them, in order.
    reduction
        What stays of those, as rows of all of them one after the other; None if there are none.
    """

    counts: list[list[int]]
    chosen: list[tuple[int, int]]
    reduction: Reduction | None


def move_tables(tables: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Tables of integers by name, built on the host, as int64 on a device: one copy moves all."""
    if not tables:
        return {}
    parts = [np.asarray(values, dtype=np.int64) for values in tables.values()]
    packed = torch.from_numpy(np.concatenate(parts)).to(device)
    return dict(zip(tables, packed.split([len(part) for part in parts]), strict=True))


def compact(
    layout: RowLayout, selection: Selection, device: torch.device
) -> tuple[RowLayout, Tensor, Tensor | None]:
    """The layout after a stage, and its index into `layout`.

    Which columns text and whole spans come from is known on the host. One table holds them, the
    columns of the tokens that may leave, and the places of those that stay; it moves to the device
    once, where the kept rows are filled in.

    Returns
    -------
    RowLayout
    Tensor of int64, shape (B, new width)
        Column of `layout` for every new column; 0 at padding.
    Tensor of int64, or None
        Flat places (sample · new width + column) of the rows of `selection.reduction`.
    """
    pairs = list(zip(layout.spans, selection.counts, strict=True))
    lengths = [
        n - sum(old.count for old in live) + sum(counts)
        for n, (live, counts) in zip(layout.lengths, pairs, strict=True)
    ]
    width, chosen = max(lengths), set(selection.chosen)
    table = np.zeros((len(lengths), width), dtype=np.int64)
    spans, columns, places = [], [], []
    for b, (live, counts) in enumerate(pairs):
        at, cursor, moved = width - lengths[b], layout.width - layout.lengths[b], []
        for j, (old, count) in enumerate(zip(live, counts, strict=True)):
            text = old.start - cursor
            table[b, at : at + text] = np.arange(cursor, old.start)
            at += text
            moved.append(KeptSpan(old.span, at, count))
            if (b, j) in chosen:
                columns.append(np.arange(old.start, old.stop))
                places.append(np.arange(at, at + count) + b * width)
            else:
                table[b, at : at + count] = np.arange(old.start, old.start + count)
            at, cursor = at + count, old.stop
        table[b, at:] = np.arange(cursor, layout.width)
        spans.append(moved)
    prompts = [_shrunk(layout, b, moved, width - lengths[b]) for b, moved in enumerate(spans)]
    tables, reduction, place = {"index": table.ravel()}, selection.reduction, None
    if reduction is not None:
        tables |= {"place": np.concatenate(places), "column": np.concatenate(columns)}
    on_device = move_tables(tables, device)
    flat = on_device["index"]
    if reduction is not None:
        place, kept = on_device["place"], reduction.keep.to(device)
        flat.index_copy_(0, place, on_device["column"].index_select(0, kept))
    index = flat.view(table.shape)
    origin = index if layout.origin is None else layout.origin.gather(1, index)
    after = RowLayout(width, lengths, spans, origin, prompts=prompts)
    if layout.sizes is not None or (reduction is not None and reduction.sizes is not None):
        after.sizes = _sizes(layout, after, index, reduction, place)
    after.raters = None if layout.raters is None else layout.raters.gather(1, index)
    return after, index, place


def _shrunk(
    layout: RowLayout, sample: int, after: list[KeptSpan], shift: int
) -> list[PromptColumns]:
    """The prompts of a row whose spans shrank to `after`, behind `shift` columns of padding."""
    first = layout.width - layout.lengths[sample]
    pairs = list(zip(layout.spans[sample], after, strict=True))

    def place(column: int) -> int:
        removed = sum(old.count - new.count for old, new in pairs if old.start < column)
        return column - first - removed + shift

    return [
        PromptColumns(place(p.start), place(p.stop), place(p.question_stop))
        for p in layout.prompts[sample]
    ]


def _sizes(
    before: RowLayout,
    after: RowLayout,
    index: Tensor,
    reduction: Reduction | None,
    place: Tensor | None,
) -> Tensor:
    """Sizes of the columns of `after`; 1 at padding. There are sizes, before or in `reduction`."""
    merged = None if reduction is None else reduction.sizes
    if before.sizes is None:
        sizes = torch.ones(index.shape, device=index.device)
    else:
        valid = after.valid(index.device)
        sizes = before.sizes.gather(1, index)
        sizes = sizes if valid is None else sizes.masked_fill(~valid, 1.0)
    if merged is not None and place is not None:
        sizes.view(-1).index_copy_(0, place, merged.to(sizes))
    return sizes


def take(
    tensors: Sequence[Tensor], index: Tensor, dims: Sequence[int], valid: Tensor | None = None
) -> list[Tensor]:
    """Columns `index` of every tensor; one launch for all of them on a GPU.

    Parameters
    ----------
    tensors
        On one device with `index`, any dtypes. The batch axis stands before the sequence axis;
        of size 1 it is shared by all samples.
    index : Tensor of int64, shape (B, n)
    dims
        Sequence axis of each tensor, may be negative.
    valid : Tensor of bool, shape (B, n), or None
        False at padding, which becomes 0: copies of other tokens there could carry NaN along.
    """
    from tokencomp.kernels import gather_rows

    if valid is not None:
        index = index.masked_fill(~valid, -1)
    # Complex rotary tables (Llama 4) are moved as pairs of real numbers.
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    dims = [d % t.ndim for d, t in zip(dims, tensors, strict=True)]
    before = [dim - 1 for dim in dims]  # the axis of the batch
    rows: list[Tensor] = gather_rows(real, index, dims, before, trusted=True)
    return [
        torch.view_as_complex(row) if t.is_complex() else row
        for row, t in zip(rows, tensors, strict=True)
    ]
