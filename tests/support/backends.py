"""FlashAttention and FlexAttention on a CPU, so that transformers' whole paths to them run there.

Their functions are written here in plain PyTorch, after their documentation, and hold callers to
what the kernels demand. transformers does the rest as on a GPU: it takes padding out, finds packed
prompts by their positions, hands over windows and lengths, and writes masks as functions.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.integrations.flex_attention as flex_integration
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel, masking_utils

from support.families import Family

FLASH, FLEX = "flash_attention_2", "flex_attention"
Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attention of q (B, n, heads, d) to k and v (B, m, kv heads, d), without padding."""
    assert len(q) == len(k) == len(v) and dropout_p == 0.0
    rows = zip(q, k, v, strict=True)
    options = (softmax_scale, causal, window_size, softcap)
    return torch.stack([_attention(*row, *options) for row in rows])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """The same for sequences in one row: q (N, heads, d), k and v (M, kv heads, d)."""
    assert dropout_p == 0.0 and len(cu_seqlens_q) == len(cu_seqlens_k)
    bounds = zip(
        _bounds(cu_seqlens_q, len(q), max_seqlen_q),
        _bounds(cu_seqlens_k, len(k), max_seqlen_k),
        strict=True,
    )
    options = (softmax_scale, causal, window_size, softcap)
    return torch.cat([_attention(q[a], k[b], v[b], *options) for a, b in bounds])


def _bounds(cumulative: Tensor, total: int, longest: int) -> list[slice]:
    """The sequences between cumulative lengths, which the kernel reads without any check."""
    assert cumulative.dtype == torch.int32 and cumulative.ndim == 1
    ends = cumulative.tolist()
    assert ends[0] == 0 and ends[-1] == total and ends == sorted(ends)
    found = [slice(a, b) for a, b in itertools.pairwise(ends)]
    assert int(longest) >= max(s.stop - s.start for s in found)
    return found


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: Window,
    softcap: float,
) -> Tensor:
    """One sequence: the last query stands at the last key, as since FlashAttention 2.1."""
    (n, heads, dim), (m, kv_heads, _) = q.shape, k.shape
    assert k.shape == v.shape == (m, kv_heads, dim) and heads % kv_heads == 0 and dim <= 256
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    left, right = window[0], 0 if causal else window[1]
    ahead = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
    seen = torch.ones(n, m, dtype=torch.bool)
    seen &= ahead <= right if right >= 0 else seen
    seen &= ahead >= -left if left >= 0 else seen
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = torch.where(seen.any(-1)[:, None], weights, 0.0)  # who sees nothing gets zeros
    return torch.einsum("hnm,mhd->nhd", weights, v)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of query (B, heads, n, d) to key and value (B, kv heads, m, d).

    PyTorch's own function has no gradients on a CPU, and compiles whatever it is called with.
    """
    (batch, heads, n, dim), m = query.shape, key.shape[2]
    assert (heads == key.shape[1]) or (enable_gqa and heads % key.shape[1] == 0)
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    logits = query @ key.mT * (dim**-0.5 if scale is None else scale)
    places = [torch.arange(size) for size in (batch, heads, n, m)]
    if score_mod is not None:
        logits = _everywhere(score_mod, 1)(logits, *places)
    if block_mask is not None:
        assert block_mask.shape[-2:] == (n, m)
        seen = _everywhere(block_mask.mask_mod, 0)(*places)
        logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1)
    return weights.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0) @ value


def _everywhere(function: Callable[..., Tensor], values: int) -> Callable[..., Tensor]:
    """A function of `values` numbers and of sample, head, query and key, for all of them."""
    for axis in (3, 2, 1, 0):
        places = [0 if axis == other else None for other in range(4)]
        function = torch.vmap(function, in_dims=(*[0] * values, *places))
    return function


def install(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let `FLASH` or `FLEX` run on a CPU until the test is over; other backends do anyway."""
    if backend == FLASH:
        _install_flash(monkeypatch)
    elif backend == FLEX:
        _install_flex(monkeypatch)


def _install_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(package, function.__name__, function)
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    for module in (package, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    # Since 5.25, a release without the package looks for a kernel on the hub.
    known = getattr(flash_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {2: {}})[2]
    monkeypatch.setitem(known, "general_availability_check", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None, raising=False)
    monkeypatch.setattr(flash_integration, "_use_top_left_mask", False)
    # What is left of transformers' check: packages and devices are not asked for.
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", _takes_flash)
    if "s_aux=s_aux.to(" in inspect.getsource(flash_integration.flash_attention_forward):
        pytest.skip("transformers 5.6.0 fails under FlashAttention, with or without a patch")


def _takes_flash(model: Any, *args: Any, **kwargs: Any) -> bool:
    if not model._supports_flash_attn:
        raise ValueError(f"{type(model).__name__} does not support FlashAttention")
    return True


def _install_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*args: Any, _compile: bool = False, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", flex_attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", make)


def build(family: Family, backend: str) -> nn.Module:
    """A model of the family under `backend`, in its text model alone if its tower takes it not.

    Skips the test where transformers refuses the backend for the text model too.
    """
    for wanted in (family.attention(backend), {"text_config": backend}):
        model = family.build()
        try:
            model.set_attn_implementation(wanted)
        except ValueError as refusal:
            reason = str(refusal)
        else:
            return model
    pytest.skip(f"transformers: {reason}")
