"""Attention masks as the installed transformers release makes them, by feature detection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from tokencomp.errors import UnsupportedCacheError, UnsupportedModelError
from tokencomp.torchlib.compat import attention_implementation


class MaskView:
    """The part of a cache that HF mask code reads, frozen at the start of a forward call.

    Layers of one cache can hold different numbers of rows, and some have already been written
    when a later layer's mask is built; this view answers for one layer at the call's start.

    Parameters
    ----------
    physical
        Rows held. Or rows that a static layer can hold, of which `written` (a tensor) are.
    dropped
        Logical column of the first row.
    """

    is_sliding = (False,)

    def __init__(self, physical: int, dropped: int = 0, written: Tensor | None = None) -> None:
        self.physical, self.dropped, self.written = physical, dropped, written

    @property
    def is_compileable(self) -> bool:
        """Whether shapes stay as they are from token to token."""
        return self.written is not None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Logical column of the first query."""
        return self.physical + self.dropped if self.written is None else self.written

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: int, layer_idx: int = 0) -> tuple[int, int]:
        """Rows that are attended to, and the logical column of the first."""
        if self.written is not None:
            return self.physical, self.dropped
        return self.physical + query, self.dropped


_MASK_PARAMETERS: set[str] = set()


def mask_parameters() -> set[str]:
    """Parameters of transformers' factory of causal masks; Dynamo only reads what is known."""
    if not _MASK_PARAMETERS:
        from transformers.masking_utils import create_causal_mask

        _MASK_PARAMETERS.update(inspect.signature(create_causal_mask).parameters)
    return _MASK_PARAMETERS


def causal_mask(
    config: Any,
    hidden: Tensor,
    mask: Tensor | None,
    view: MaskView,
    text: Tensor | None = None,
    within: Callable[..., Any] | None = None,
    skip: bool = True,
) -> Any:
    """Transformers' own causal mask for one layer, whatever the attention backend.

    Parameters
    ----------
    hidden : Tensor, shape (B, q, d)
        Read for its batch size, length, dtype and device.
    mask : Tensor of bool, shape (B, dropped + physical + q), or None
    text : Tensor of int64, shape (B, q), or None
        Positions that begin again in every prompt of a packed row; there is no cache then.
    within
        Function of sample, head, query and key, as indices of logical columns, that says which
        keys a query may see besides being causal; None: all.
    skip
        Whether the result may be None where plain causal attention is right.
    """
    from transformers.masking_utils import create_causal_mask

    names = mask_parameters()
    call: dict[str, Any] = {"config": config, "inputs_embeds": hidden, "attention_mask": mask}
    call["cache" if "cache" in names else "past_key_values"] = view if text is None else None
    call["position_ids"] = text
    if within is not None:
        call["and_mask_function"] = within
    if "allow_is_causal_skip" in names:
        call["allow_is_causal_skip"] = skip
    return create_causal_mask(**call)


def check_flash_on_static() -> None:
    """Refuse static caches where transformers keeps no 2-D mask without padding."""
    from transformers.masking_utils import flash_attention_mask

    written = torch.ones(1, 1, dtype=torch.bool)
    mask = flash_attention_mask(batch_size=1, q_length=1, kv_length=2, attention_mask=written)
    if mask is None:
        raise UnsupportedCacheError(
            "FlashAttention in this release of transformers reads the unwritten rows of a static "
            "cache, with or without compression. Drop cache_implementation=..., use "
            'attn_implementation="sdpa", or update transformers.'
        )


def backend_mask(config: Any, visible: Tensor, x: Tensor) -> Any:
    """A mask of bool (B, 1, n, columns) as the attention backend takes it.

    Bools for SDPA, numbers for eager attention, blocks for FlexAttention, and the columns that are
    no padding (B, columns) for FlashAttention, which can hide nothing else. Backends with other
    masks are refused.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

    backend = attention_implementation(config)
    if "flash" in backend:
        padding = visible[:, 0, -1]  # the last query sees every real column
        if not only_padding(visible, padding, visible.shape[-1] - x.shape[1]):
            raise UnsupportedModelError(
                f"the backend {backend} takes no mask but one of padding, and these layers need "
                'one that hides other tokens too. Use attn_implementation="sdpa".'
            )
        return padding
    if "flex" in backend:
        return block_mask(visible)
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(backend, sdpa_mask)
    if make is sdpa_mask:
        return visible
    if make is not eager_mask:
        raise UnsupportedModelError(
            f"the attention backend {backend!r} is not supported, because the form of its masks is "
            'not known. Use attn_implementation="sdpa", "eager", "flex_attention" or '
            '"flash_attention_2".'
        )
    hidden = torch.full((), torch.finfo(x.dtype).min, dtype=x.dtype, device=visible.device)
    return torch.where(visible, hidden.new_zeros(()), hidden)


def only_padding(visible: Tensor, padding: Tensor, past: int) -> bool:
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


def block_mask(visible: Tensor) -> BlockMask:
    """A mask of bool (B, 1, queries, columns) as FlexAttention takes it."""

    def shown(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[sample, 0, query, key]

    batch, _, queries, keys = visible.shape
    return create_block_mask(shown, batch, None, queries, keys, device=visible.device)


def visible_columns(mask: Any) -> Tensor:
    """Which columns a prepared mask shows, bool (B, 1, queries, columns).

    One of numbers hides by adding a negative; one of FlexAttention is a function.
    """
    if isinstance(mask, BlockMask):
        batch, heads, queries, keys = mask.shape
        device = mask.kv_indices.device
        shown: Tensor = create_mask(mask.mask_mod, batch, heads, queries, keys, device=device)
        return shown
    visible: Tensor = mask if mask.dtype == torch.bool else mask >= 0
    return visible
