"""The passes `gather` and `restore`: from the columns of the caller to kept rows, and back.

Before the layers, everything with one entry per column is gathered at the kept rows. After them,
the output gets its full length again:

    columns of the caller   0  1  2  3  4  5  6  7
    kept rows               0  1        4     6  7      `take`, `gather_arguments`
    output                  0  1  1  1  4  4  6  7      `restore`: a dropped column repeats a row
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.call import Call, Segment
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


# -- before the layers --------------------------------------------------------------------------


def gather_arguments(
    kwargs: MutableMapping[str, Any], index: Tensor, mask: Tensor | None, width: int
) -> None:
    """Gather, in place, all arguments of a decoder call that have one entry per row.

    These are tensors (B or 1, width, ...), also inside mappings and lists: per-layer inputs, token
    types, ids for routers and hashes. Deepstack features have one row per visual token of the batch
    instead, and are recognised by name. `index` (B, n) has, for every kept row, its index among the
    `width` entries; `mask` (B, n) is False at padding, where entries become 0.
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
        # Scalars, tables and states have no axis of columns.
        if value.ndim < 2 or value.shape[1] != width or value.shape[0] not in (1, len(columns)):
            return value
        return gather_rows([value], columns.to(value.device))[0]
    if isinstance(value, Mapping):
        return {key: _gathered(item, columns, width) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_gathered(item, columns, width) for item in value)
    return value


def _gather_deepstack(
    kwargs: MutableMapping[str, Any], mask_name: str, features_name: str, columns: Tensor
) -> None:
    from tokencomp.kernels import gather_rows

    mask: Tensor = kwargs[mask_name].to(columns.device)  # (B, L), or (B, L, d) with equal columns
    flat = mask if mask.ndim == 2 else mask[..., 0]
    # mask 0 1 1 0 1: numbers -1 0 1 1 2: of a visual column, the row of its features.
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


def bounds(row_map: RowMap, sample: int) -> list[int]:
    """First rows of the padding (if any) and of every prompt of a sample, and its end."""
    starts = [p.start for p in row_map.prompts[sample]]
    if starts[0] > 0:
        starts.insert(0, 0)
    return [*starts, row_map.rows]


def text_positions(row_map: RowMap, device: torch.device) -> Tensor:
    """Positions without gaps that restart at 0 at every packed prompt, (B, rows) or (1, rows).

    transformers takes a gap for the start of a packed prompt, so only the rotary embedding gets the
    original positions. Padding counts as one more prompt.
    """
    if not row_map.packed:
        return torch.arange(row_map.rows, device=device)[None]
    positions = []
    for b in range(len(row_map.prompts)):
        pairs = itertools.pairwise(bounds(row_map, b))
        positions.append(torch.cat([torch.arange(stop - start) for start, stop in pairs]))
    return torch.stack(positions).to(device)


def sequence_lengths(row_map: RowMap, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `cu_seq_lens_*` and `max_length_*` arguments among `kwargs`, for the rows of a map."""
    # One padding row and prompts of three and two rows: edges 0 1 4 6.
    edges = [0]
    for b in range(len(row_map.prompts)):
        edges += [b * row_map.rows + stop for stop in bounds(row_map, b)[1:]]
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
    """Gather rows `index` (B, n) of every tensor; on a GPU in one launch.

    `tensors`, of any dtypes, are on the device of `index`. The batch axis, of B or 1 entries,
    precedes the sequence axis, `dims` of each tensor, which may be negative. `mask` (B, n) is False
    at padding, which becomes 0: copies of other tokens there could carry NaN.
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


# -- after the layers: the output ---------------------------------------------------------------


def restore(x: Tensor, row_map: RowMap, width: int) -> Tensor:
    """Expand rows of x (B, rows, d) to the columns of the caller's batch, (B, width, d).

    A dropped column repeats the last row before it, which predicts what follows: a label right
    after a dropped token still trains. Columns without an earlier row are zero.
    """
    if row_map.columns is None:
        return x
    columns, full = torch.arange(width, device=x.device), []
    for b, length in enumerate(row_map.lengths):
        # Number of kept columns up to each column; row 0 of `padded` is zero.
        held = row_map.columns[b, row_map.rows - length :].to(x.device)
        before = torch.searchsorted(held, columns, right=True)
        padded = nn.functional.pad(x[b, row_map.rows - length :], (0, 0, 1, 0))
        full.append(padded[before])
    return torch.stack(full)


def restore_states(out: Any, segments: Sequence[Segment], width: int, keep_last_state: bool) -> Any:
    """Expand the hidden states of a decoder's output to `width` columns; in place if no tuple.

    `keep_last_state` leaves the last state short: only logits of the text at the end are needed.
    """
    states = getattr(out, "hidden_states", None)
    if states is not None:
        out.hidden_states = _full_states(states, segments, width)
    if keep_last_state:
        return out
    rows = segments[-1].new
    if isinstance(out, tuple):
        return (restore(out[0], rows, width), *out[1:])
    last = out.last_hidden_state
    out.last_hidden_state = restore(last, rows, width)
    if states is not None and states[-1] is last:  # the same tensor, for gradients
        out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
    return out


def _full_states(states: Sequence[Any], segments: Sequence[Segment], width: int) -> tuple[Any, ...]:
    """Expand the input of the first layer, then the output of every layer."""
    maps = [s.new for s in segments for _ in range(s.first, s.stop)]
    pairs = zip(states, [maps[0], *maps[: len(states) - 1]], strict=True)
    return tuple(s if s is None else _full_state(s, rows, width) for s, rows in pairs)


def _full_state(x: Tensor, row_map: RowMap, width: int) -> Tensor:
    """`restore`, also for S streams of hidden states: (S, B, n, d) or (B, n, S, d)."""
    if row_map.columns is None or x.ndim == 3:
        return restore(x, row_map, width)
    # Streams precede the samples here, and follow the rows below.
    if x.shape[:2] != (len(row_map.lengths), row_map.rows):
        return torch.stack([restore(stream, row_map, width) for stream in x])
    whole: Tensor = restore(x.flatten(2), row_map, width).unflatten(2, x.shape[2:])
    return whole


def restore_map(weights: Tensor, segment: Segment, width: int) -> Tensor:
    """Expand an attention map (B, H, rows of this call, all rows) to (B, H, width, all columns).

    A dropped key has weight 0. A dropped query repeats the last row before it, as in `restore`.
    """
    batch, heads, queries, _ = weights.shape
    columns = segment.columns(batch, weights.device)
    if columns is None:
        return weights
    # A static cache ends in unwritten rows; a sliding layer holds only the last rows.
    held = min(weights.shape[-1], columns.shape[1])
    weights, columns = weights[..., :held], columns[:, -held:]
    # Padding rows can share a column with other rows; their weights are 0.
    full = weights.new_zeros(batch, heads, queries, segment.past.length + width)
    full = full.scatter_add(-1, columns[:, None, None].expand_as(weights), weights)
    rows = restore(full.transpose(1, 2).flatten(2), segment.new, width)
    split: Tensor = rows.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def restore_maps(maps: Any, call: Call, layers: Sequence[Any]) -> Any:
    """Expand the attention maps of a decoder: one per layer, some of them None, or one per layer
    that attends, as of Qwen3.5.

    `layers`: layers of the KV cache. Maps of sliding layers begin with the columns that their cache
    layer holds, as without a patch.
    """
    width, layer_types, full = call.width, call.layer_types, []
    # Qwen3.5 returns maps of its attention layers alone, other decoders one entry per layer.
    numbers = [i for i, layer_type in enumerate(layer_types.types) if layer_type.attends]
    if len(maps) != len(numbers):
        numbers = [*range(len(maps))]
    # Only a sliding cache returns fewer keys than the sequence has.
    cut = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    for i, weights in zip(numbers, maps, strict=True):
        segment = call.segment_of[i]
        size = layer_types.sizes.get(layer_types.types[i].name) if cut else None
        if weights is not None:
            weights = restore_map(weights, segment, width)
        if weights is not None and size is not None:
            weights = weights[..., -(min(segment.past.length, size - 1) + width) :]
        full.append(weights)
    return tuple(full)


def whole_output(out: Any, earlier: list[Tensor]) -> Any:
    """The output of the last chunk, with the hidden states of earlier chunks before it."""
    if not earlier:
        return out
    if isinstance(out, tuple):
        return (torch.cat([*earlier, out[0]], dim=1), *out[1:])
    out.last_hidden_state = torch.cat([*earlier, out.last_hidden_state], dim=1)
    return out
