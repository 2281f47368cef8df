"""The pass `gather`: selects the kept rows of everything that has one entry per row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.rowmap import RowMap
from tokencomp.torchlib.compat import CACHE_NAMES

# Arguments that `set_arguments` computes instead.
SET_APART = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")
# A mask of visual columns (B, L), and features of these columns alone, one row for each. The
# first decoder layers add them to the hidden states (arXiv 2406.04334).
DEEPSTACK = (
    ("visual_pos_masks", "deepstack_visual_embeds"),
    ("vision_mask", "deepstack_features"),
)
# Lengths of the prompts packed into one sample. Without a mask and a cache, transformers also
# infers packed prompts from positions that restart.
CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")


def gather_arguments(
    kwargs: MutableMapping[str, Any], index: Tensor, mask: Tensor | None, width: int
) -> None:
    """Gather, in place, all arguments of a decoder call that have one entry per row.

    These are tensors (B or 1, width, ...), also inside mappings and lists: per-layer inputs, token
    types, ids for routers and hashes. Deepstack features have one row per visual token of the batch
    instead, and are recognised by name.

    Parameters
    ----------
    index : Tensor of int64, shape (B, n)
        For every kept row: its index among the `width` entries.
    mask : Tensor of bool, shape (B, n), or None
        False at padding, where entries become 0.
    """
    # Index -1 gathers zeros.
    columns = index if mask is None else index.masked_fill(~mask, -1)
    for mask_name, features_name in DEEPSTACK:
        if kwargs.get(mask_name) is not None:
            _gather_deepstack(kwargs, mask_name, features_name, columns)
    apart = {*SET_APART, *CACHE_NAMES, *(name for pair in DEEPSTACK for name in pair)}
    for name in set(kwargs) - apart:
        kwargs[name] = _gathered(kwargs[name], columns, width)


def _gathered(value: Any, columns: Tensor, width: int) -> Any:
    from tokencomp.kernels import gather_rows

    if isinstance(value, Tensor):
        if value.ndim < 2 or value.shape[1] != width or value.shape[0] not in (1, len(columns)):
            return value
        return gather_rows([value], columns.to(value.device))[0]
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    return each(value, lambda item: _gathered(item, columns, width))


def each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to all items of a mapping, list or tuple; other values are unchanged."""
    if isinstance(value, Mapping):
        return {key: change(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(change(item) for item in value)
    return value


def _gather_deepstack(
    kwargs: MutableMapping[str, Any], mask_name: str, features_name: str, columns: Tensor
) -> None:
    from tokencomp.kernels import gather_rows

    mask: Tensor = kwargs[mask_name].to(columns.device)  # (B, L), or (B, L, d) with equal columns
    flat = mask if mask.ndim == 2 else mask[..., 0]
    number = flat.flatten().cumsum(0).view_as(flat) - 1
    kwargs[mask_name], kept, number = gather_rows([mask, flat, number], columns)

    def rows(features: Tensor) -> Tensor:
        (gathered,) = gather_rows([features.to(columns.device)[None]], number[kept][None])
        row: Tensor = gathered[0]
        return row

    value = kwargs[features_name]
    if isinstance(value, Mapping):
        kwargs[features_name] = {layer: rows(features) for layer, features in value.items()}
    elif value is not None:
        kwargs[features_name] = [rows(features) for features in value]


def bounds(rows: RowMap, sample: int) -> list[int]:
    """First rows of the padding (if any) and of every prompt of a sample, and its end."""
    starts = [p.start for p in rows.prompts[sample]]
    if starts[0] > 0:
        starts.insert(0, 0)
    return [*starts, rows.rows]


def text_positions(rows: RowMap, device: torch.device) -> Tensor:
    """Positions without gaps that restart at 0 at every packed prompt, (B, rows) or (1, rows).

    transformers takes a gap for the start of a packed prompt, so only the rotary embedding gets the
    original positions. Padding counts as one more prompt.
    """
    if not rows.packed:
        return torch.arange(rows.rows, device=device)[None]
    positions = []
    for b in range(len(rows.prompts)):
        pairs = itertools.pairwise(bounds(rows, b))
        positions.append(torch.cat([torch.arange(stop - start) for start, stop in pairs]))
    return torch.stack(positions).to(device)


def sequence_lengths(rows: RowMap, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `cu_seq_lens_*` and `max_length_*` arguments among `kwargs`, for the rows of a map."""
    edges = [0]
    for b in range(len(rows.prompts)):
        edges += [b * rows.rows + stop for stop in bounds(rows, b)[1:]]
    longest, changed = max(b - a for a, b in itertools.pairwise(edges)), {}
    for name in CUMULATIVE:
        if isinstance(kwargs.get(name), Tensor):
            changed[name] = kwargs[name].new_tensor(edges)
    for name in LONGEST:
        value = kwargs.get(name)
        if value is not None:
            changed[name] = value.new_tensor(longest) if isinstance(value, Tensor) else longest
    return changed


def take(
    tensors: Sequence[Tensor], index: Tensor, dims: Sequence[int], mask: Tensor | None = None
) -> list[Tensor]:
    """Gather rows `index` of every tensor; on a GPU in one launch.

    Parameters
    ----------
    tensors
        On the device of `index`, any dtypes. The batch axis precedes the sequence axis; a batch of
        1 is shared by all samples.
    index : Tensor of int64, shape (B, n)
    dims
        Sequence axis of each tensor, may be negative.
    mask : Tensor of bool, shape (B, n), or None
        False at padding, which becomes 0: copies of other tokens there could carry NaN.
    """
    from tokencomp.kernels import gather_rows

    if mask is not None:
        index = index.masked_fill(~mask, -1)
    # Complex rotary tables (Llama 4) are gathered as pairs of real numbers.
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    dims = [d % t.ndim for d, t in zip(dims, tensors, strict=True)]
    before = [dim - 1 for dim in dims]  # batch axis of each tensor
    rows: list[Tensor] = gather_rows(real, index, dims, before, trusted=True)
    return [
        torch.view_as_complex(row) if t.is_complex() else row
        for row, t in zip(rows, tensors, strict=True)
    ]
