"""Several prompts packed into one row: positions and lengths that keep them apart.

Training code packs prompts to save padding. transformers distinguishes them by positions that start
again (without a mask and a cache) or by the `cu_seq_lens_*` arguments of FlashAttention.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.rows.layout import RowLayout

CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")


def bounds(layout: RowLayout, sample: int) -> list[int]:
    """First columns of the padding (if any) and of the prompts of a row, and its end."""
    starts = [p.start for p in layout.prompts[sample]]
    if starts[0] > 0:
        starts.insert(0, 0)
    return [*starts, layout.width]


def text_positions(layout: RowLayout, device: torch.device) -> Tensor:
    """One position per token without gaps, which begins at 0 in every prompt of a packed row.

    transformers takes a gap for the begin of a new prompt, so positions with the gaps of dropped
    tokens are for the rotary embedding alone. Padding becomes a prompt of its own.

    Returns
    -------
    Tensor of int64, shape (B, width), or (1, width) where no row is packed
    """
    if not layout.packed:
        return torch.arange(layout.width, device=device)[None]
    rows = []
    for b in range(len(layout.prompts)):
        pairs = itertools.pairwise(bounds(layout, b))
        rows.append(torch.cat([torch.arange(stop - start) for start, stop in pairs]))
    return torch.stack(rows).to(device)


def sequence_lengths(layout: RowLayout, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `cu_seq_lens_*` and `max_length_*` arguments among `kwargs`, for the rows of `layout`."""
    edges = [0]
    for b in range(len(layout.prompts)):
        edges += [b * layout.width + stop for stop in bounds(layout, b)[1:]]
    longest, changed = max(b - a for a, b in itertools.pairwise(edges)), {}
    for name in CUMULATIVE:
        if isinstance(kwargs.get(name), Tensor):
            changed[name] = kwargs[name].new_tensor(edges)
    for name in LONGEST:
        value = kwargs.get(name)
        if value is not None:
            changed[name] = value.new_tensor(longest) if isinstance(value, Tensor) else longest
    return changed
