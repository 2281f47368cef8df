"""Proportional attention: a merged token weighs as much as the tokens it stands for.

Softmax logits get + log(size) (ToMe, arXiv 2210.09461). Ours: the attention backend does the adding
itself. Queries and keys get a few more dimensions whose product is the logarithm, so SDPA,
FlashAttention and eager run as they are, without a mask of their own; the cache holds plain keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.engine import compat
from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.plan import Plan

NAME = "tokencomp_proportional"
MULTIPLE = 8  # FlashAttention takes head dimensions that are multiples of 8

SizesOf = Callable[[int], Tensor | None]


class ProportionalAttention:
    """Puts the added dimensions into the attention calls of some decoder layers.

    Only the `config` attribute of their attention modules changes: it names a function that widens
    queries, keys and values and then calls the user's own backend. The model's config stays.

    Parameters
    ----------
    layers
        Decoder layers of one model.
    sizes_of
        Layer index → sizes of the first cached rows, fp32 (B, m), in the call that runs now; later
        rows stand for one token each. None: all do, and the backend is called unchanged.

    Raises
    ------
    UnsupportedModelError
        An attention module has no config.
    """

    def __init__(self, layers: Iterable[nn.Module], sizes_of: SizesOf) -> None:
        self._modules: list[Any] = [layer.self_attn for layer in layers]
        self._sizes_of = sizes_of
        for module in self._modules:
            if getattr(module, "config", None) is None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has no config that names its attention backend, so "
                    "proportional_attention=True cannot reach it. Patch without it."
                )

    def install(self) -> None:
        compat.register_attention(NAME, attend)
        for module in self._modules:
            module.config = _Config(module.config, self._sizes_of)

    def remove(self) -> None:
        for module in self._modules:
            if isinstance(getattr(module, "config", None), _Config):
                module.config = module.config.tokencomp_original


class _Config:
    """The config of an attention module, but for the name of the backend."""

    _attn_implementation = NAME

    def __init__(self, original: Any, sizes_of: SizesOf) -> None:
        self.tokencomp_original, self.tokencomp_sizes_of = original, sizes_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokencomp_original"], name)


class _Plain:
    """An attention module as its backend would find it without a patch."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a patched attention module calls: the user's backend, on widened tensors.

    Parameters
    ----------
    query : Tensor, shape (B, H, q, d)
    key, value : Tensor, shape (B, kv heads, k, d)

    Returns
    -------
    Tensor, shape (B, q, H, d), and the backend's attention weights or None
    """
    config = module.config
    plain = _Plain(module, config.tokencomp_original)
    backend = compat.attention_function(module, plain.config)
    sizes, dim = config.tokencomp_sizes_of(module.layer_idx), value.shape[-1]
    if sizes is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = widen(query, key, value, sizes, scaling)
    out, weights = backend(plain, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return out[..., :dim], weights


def widen(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add dimensions such that scaling · q·k gains log(size) of every key.

    The head dimension grows to the next multiple of 8 with room for two: the logarithm and, in low
    precision, what rounding took from it. Values get zeros, which some backends ask for.

    Parameters
    ----------
    query : Tensor, shape (B, H, q, d)
    key, value : Tensor, shape (B, kv heads, k, d)
    sizes : Tensor of float32, shape (B, m), m ≤ k
        Tokens that the first m keys stand for; the others stand for one.
    """
    dim, rows = query.shape[-1], key.shape[-2]
    extra = -(-(dim + 2) // MULTIPLE) * MULTIPLE - dim
    factor = 2.0 ** round(-math.log2(scaling))  # a power of two is exact in every dtype
    wanted = sizes.to(key.device).float().log() / (scaling * factor)
    wanted = nn.functional.pad(wanted, (0, rows - wanted.shape[1]))
    high = wanted.to(key.dtype)
    added = key.new_zeros(key.shape[0], 1, rows, extra)
    added[:, 0, :, 0], added[:, 0, :, 1] = high, wanted - high.float()
    asks = query.new_zeros(extra)
    asks[:2] = factor
    return (
        torch.cat([query, asks.expand(*query.shape[:-1], extra)], dim=-1),
        torch.cat([key, added.expand(*key.shape[:-1], extra)], dim=-1),
        nn.functional.pad(value, (0, query.shape[-1] + extra - value.shape[-1])),
    )


def check_merges(plan: Plan, reducer: Any = None) -> None:
    """Raise `OptionError` unless the reducer (or a stage of a plan made by hand) merges tokens."""
    found = [reducer] if reducer is not None else [s.reducer for s in plan.stages]
    if not any(r.merges for r in found):
        names = ", ".join(repr(r.name) for r in found) or "a plan without stages"
        raise OptionError(
            f"proportional_attention=True: {names} merges no tokens, so every token stands for "
            'itself. Use a reducer that merges ("merge", "aim", "pool", "condiv" with '
            "merge_rest=...), or leave the option out."
        )
