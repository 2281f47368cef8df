"""The 2-D padding mask inside a mask that was prepared for the attention backend before the call.

`generate` prepares the masks of static caches before the model runs, by logical column of the
uncompressed prompt. A compressed prompt needs another one, which transformers builds again from
the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.window import FULL, LINEAR
from tokencomp.errors import UnsupportedCacheError


def prepared_by_body(mask: Any, body_mask: Any) -> Any:
    """The mask that the body of a model has prepared for its decoder, or None.

    Parameters
    ----------
    mask
        The `attention_mask` of the decoder.
    body_mask
        That of the body. Where it has more than two axes, or is a mapping, the caller has prepared
        it, and `padding_of` says what can be done.

    Returns
    -------
    Tensor of shape (B, heads, L, columns), mapping from kinds of layers to such tensors, or None
        Kinds for which plain causal attention is right have None.
    """
    prepared = isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim == 4)
    if not prepared or isinstance(body_mask, Mapping) or getattr(body_mask, "ndim", 2) != 2:
        return None
    if isinstance(mask, Mapping):
        dense = {k: m for k, m in mask.items() if isinstance(m, Tensor) and m.ndim == 4}
        return {k: dense.get(k) for k in mask} if dense else None
    return mask


def visible_columns(mask: Tensor) -> Tensor:
    """Which columns a prepared mask shows, bool: one of numbers hides by adding a negative."""
    return mask if mask.dtype == torch.bool else mask >= 0


def padding_of(mask: Any, queries: int, past: int) -> Tensor | None:
    """The 2-D mask (B, past + queries) from which `mask` was prepared.

    Parameters
    ----------
    mask
        What a decoder takes as `attention_mask`: None, a 2-D mask, a mask (B, 1, queries, columns)
        of bool or of numbers that are added to logits, or a mapping from kinds of layers to those.
    queries
        Columns of the call.
    past
        Columns before them.

    Returns
    -------
    Tensor of bool, or None where every column is real. A 2-D mask comes back as it is.

    Raises
    ------
    UnsupportedCacheError
        The mask hides more than padding and what is to come.
    """
    if isinstance(mask, Mapping):
        attention = {k: m for k, m in mask.items() if k not in LINEAR}
        if set(attention) != {FULL}:
            raise _refusal(f"a mask for each of {', '.join(sorted(mask))}")
        mask = mask[FULL]
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != queries:
        shape = tuple(mask.shape) if hasattr(mask, "shape") else mask
        raise _refusal(f"a {type(mask).__name__} of shape {shape}")
    visible = visible_columns(mask)
    if visible.shape[-1] < past + queries:
        columns = visible.shape[-1]
        raise _refusal(f"a mask of {columns} columns for {past + queries} tokens (a short cache)")
    padding = visible[:, 0, -1, : past + queries]  # the last query sees every real column
    if not _only_padding(visible, padding, past):
        raise _refusal("a 4-D mask that hides other columns than padding on the left")
    return padding


def _only_padding(visible: Tensor, padding: Tensor, past: int) -> bool:
    """Whether `visible` (B, heads, q, columns) is causal with `padding` at every real query."""
    columns, queries = visible.shape[-1], visible.shape[-2]
    if padding.shape[1] < past + queries:
        return False
    order = torch.arange(columns, device=visible.device)
    causal = order <= past + torch.arange(queries, device=visible.device)[:, None]
    real = torch.nn.functional.pad(padding, (0, columns - padding.shape[1]))
    expected = causal & real[:, None, None, :]
    ignored = ~padding[:, None, past:, None]  # rows of padding are never read
    return bool(((visible == expected) | ignored).all())


def _refusal(description: str) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"attention_mask is {description}, prepared before the decoder was called. A "
        "compressed prompt needs the 2-D mask of padding, or one that transformers prepared from "
        "it for a static cache with sdpa or eager attention. Pass the 2-D attention_mask "
        "of the processor."
    )
