"""Attention masks in the form that the installed transformers release expects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)

from tokencomp.errors import UnsupportedCacheError, UnsupportedModelError
from tokencomp.torchlib.compat import attention_implementation

# Parameters of transformers' function. Read here, because Dynamo cannot inspect signatures.
MASK_PARAMETERS = frozenset(inspect.signature(create_causal_mask).parameters)


@dataclass(eq=False)
class MaskView:
    """The part of a cache that transformers' mask functions read, for one layer.

    Layers of a compressed cache differ in their number of rows, and earlier layers are already
    updated when the mask of a later layer is built. The view holds the state at the start of the
    call.
    """

    physical: int  # number of rows held
    # Entry of the first held row in the 2-D mask: the number of columns before the call minus
    # `physical`.
    offset: int = 0
    is_sliding: ClassVar[tuple[bool, ...]] = (False,)
    is_compileable: ClassVar[bool] = False  # whether the cache has static shapes

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Entry of the first query in the 2-D mask."""
        return self.physical + self.offset

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of key rows, and the entry of the first in the 2-D mask."""
        return self.physical + query, self.offset


@dataclass(eq=False)
class StaticMaskView(MaskView):
    """The same of a static layer that can hold `physical` rows, from entry 0 on."""

    written: Tensor | int = 0  # rows that are written, or entry of the first query in the 2-D mask
    is_compileable: ClassVar[bool] = True

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.written

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.physical, self.offset


def causal_mask(
    config: Any,
    hidden: Tensor,
    mask: Tensor | None,
    view: MaskView,
    text: Tensor | None = None,
    within: Callable[..., Any] | None = None,
    skip: bool = True,
) -> Any:
    """Transformers' causal mask of one layer, in the form of the attention backend.

    Of `hidden` (B, q, d) only batch size, length, dtype and device are read. `mask`, bool (B,
    offset + physical + q), is False at padding rows; its first row is at entry `offset` of the
    view. `text`, int64 (B, q), are positions that restart at every prompt of a packed row, without
    a cache. `within` says of sample, head, query and key, the last two as entries of the 2-D mask,
    whether the query may attend to the key, in addition to causality. With `skip` the result may be
    None where plain causal attention is right.
    """
    names = MASK_PARAMETERS
    call: dict[str, Any] = {"config": config, "inputs_embeds": hidden, "attention_mask": mask}
    call["cache" if "cache" in names else "past_key_values"] = view if text is None else None
    call["position_ids"] = text
    if within is not None:
        call["and_mask_function"] = within
    if "allow_is_causal_skip" in names:
        call["allow_is_causal_skip"] = skip
    return create_causal_mask(**call)


def check_flash_on_static() -> None:
    """Raise for static caches in releases whose FlashAttention gets no 2-D mask without padding."""
    written = torch.ones(1, 1, dtype=torch.bool)
    mask = flash_attention_mask(batch_size=1, q_length=1, kv_length=2, attention_mask=written)
    if mask is None:
        raise UnsupportedCacheError(
            "FlashAttention in this release of transformers reads the unwritten rows of a static "
            "cache, with or without compression. Drop cache_implementation=..., use "
            'attn_implementation="sdpa", or update transformers.'
        )


def backend_mask(config: Any, visible: Tensor, x: Tensor) -> Any:
    """Convert `visible`, bool (B, 1, n, columns), to the form of the attention backend.

    Bool for SDPA, additive for eager attention, a block mask for FlexAttention. FlashAttention
    takes only a mask of padding, (B, columns): other masks are refused, as are unknown backends.
    """
    backend = attention_implementation(config)
    if "flash" in backend:
        padding = visible[:, 0, -1]  # the last query attends to all real columns
        if not only_padding(visible, padding, visible.shape[-1] - x.shape[1]):
            raise UnsupportedModelError(
                f"the backend {backend} supports only masks of padding, but these layers need a "
                'mask that hides other tokens too. Use attn_implementation="sdpa".'
            )
        return padding
    if "flex" in backend:
        return block_mask(visible)
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(backend, sdpa_mask)
    if make is sdpa_mask:
        return visible
    if make is not eager_mask:
        raise UnsupportedModelError(
            f"the attention backend {backend!r} is not supported: its form of masks is unknown. "
            'Use attn_implementation="sdpa", "eager", "flex_attention" or "flash_attention_2".'
        )
    hidden = torch.full((), torch.finfo(x.dtype).min, dtype=x.dtype, device=visible.device)
    return torch.where(visible, hidden.new_zeros(()), hidden)


def weighted_mask(mask: Any, logs: Tensor) -> Tensor:
    """Convert a mask to numbers, which add `logs` to the attention logits of visible keys.

    The mask is of any form, (B or 1, 1, queries, keys); None: every query sees all keys. `logs` (B,
    1, 1, keys) have the dtype of the result.
    """
    if mask is None:
        return logs
    return torch.where(visible_columns(mask), logs, torch.finfo(logs.dtype).min)


def only_padding(visible: Tensor, padding: Tensor, past: int) -> bool:
    """Whether `visible` (B, heads, q, columns) is the causal mask with `padding` at all real
    queries.
    """
    columns, queries = visible.shape[-1], visible.shape[-2]
    if padding.shape[1] < past + queries:
        return False
    order = torch.arange(columns, device=visible.device)
    causal = order <= past + torch.arange(queries, device=visible.device)[:, None]
    real = torch.nn.functional.pad(padding, (0, columns - padding.shape[1]))
    expected = causal & real[:, None, None, :]
    ignored = ~padding[:, None, past:, None]  # rows of padding are never read
    return bool(((visible == expected) | ignored).all())


def block_mask(visible: Tensor) -> BlockMask:
    """Convert bool (B, 1, queries, columns) to a block mask of FlexAttention."""

    def shown(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[sample, 0, query, key]

    batch, _, queries, keys = visible.shape
    return create_block_mask(shown, batch, None, queries, keys, device=visible.device)


def visible_columns(mask: Any) -> Tensor:
    """Convert a prepared mask of any form to bool (B, 1, queries, columns)."""
    if isinstance(mask, BlockMask):
        batch, heads, queries, keys = mask.shape
        device = mask.kv_indices.device
        shown: Tensor = create_mask(mask.mask_mod, batch, heads, queries, keys, device=device)
        return shown
    visible: Tensor = mask if mask.dtype == torch.bool else mask >= 0
    return visible
