"""Proportional attention: a merged token has the weight of all tokens that it stands for.

Proportional attention adds log(size) to the softmax logits of a merged token (ToMe,
arXiv 2210.09461). In our implementation the attention backend itself does the
addition. Queries and keys get a few more dimensions whose product is the logarithm. SDPA,
FlashAttention and eager attention therefore run unchanged and without an additional mask, and the
cache holds plain keys.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.views import AttributeView

NAME = "tokencomp_proportional"
MULTIPLE = 8  # FlashAttention requires head dimensions that are multiples of 8

SizesOf = Callable[[int, int], Tensor | None]


class BiasDims(NamedTuple):
    """Further dimensions of attention heads, see `bias_dims`."""

    of_queries: Tensor
    of_keys: Tensor


class ProportionalAttention:
    """Add the further dimensions in the attention calls of some decoder layers.

    Only the `config` attribute of their attention modules changes, between `enter` and `leave`. It
    names a function that widens queries, keys and values and then calls the user's own backend. The
    model's config does not change.

    Parameters
    ----------
    layers
        Decoder layers of one model.
    sizes_of
        Function of the layer index and the number of keys of an attention call. It returns the
        sizes of the first m of them, fp32 (B, m); later rows stand for one token each. If it
        returns None, all rows do, and the backend is called unchanged.
    """

    def __init__(self, layers: Iterable[nn.Module], sizes_of: SizesOf) -> None:
        self._layers, self._sizes_of = list(layers), sizes_of
        self._modules: list[Any] = []
        self._last: tuple[Any, ...] = (None, None, None)
        self._lock, self._prompts = threading.Lock(), 0

    def enter(self) -> None:
        """Let the modules use the function for one more prompt that runs.

        Calls that run in other threads are not disturbed: without sizes, the function does what
        the backend does.
        """
        with self._lock:
            self._prompts += 1
            if self._modules:
                return
            compat.register_attention(NAME, attend)
            self._modules = attention_modules(self._layers)
            for module in self._modules:
                module.config = AttributeView(
                    module.config, _attn_implementation=NAME, tokencomp_bias_dims=self._bias_dims
                )

    def leave(self) -> None:
        """Give the modules their original config back, if no other prompt runs."""
        with self._lock:
            self._prompts -= 1
            if not self._prompts:
                self._restore()

    def remove(self) -> None:
        """Give the modules their original config back."""
        with self._lock:
            self._prompts = 0
            self._restore()

    def _restore(self) -> None:
        for module in self._modules:
            if isinstance(getattr(module, "config", None), AttributeView):
                module.config = module.config.tokencomp_original
        self._modules, self._last = [], (None, None, None)

    @compat.not_compiled
    def _bias_dims(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> BiasDims | None:
        """The further dimensions of an attention call; None where all rows stand for one token.

        The layers of a call mostly have the same sizes, and then share them.
        """
        sizes = self._sizes_of(layer, key.shape[-2])
        if sizes is None:
            return None
        case = key.shape[-2], query.shape[-1], query.dtype, key.dtype, key.device, scaling
        of, known, found = self._last  # one tuple, so that threads do not mix theirs
        if of is not sizes or known != case:
            found = bias_dims(query, key, sizes, scaling)
            self._last = sizes, case, found
        own: BiasDims = found
        return own


def attention_modules(layers: Iterable[nn.Module]) -> list[Any]:
    """The attention modules of decoder layers, whose configs name their backend.

    Raises
    ------
    UnsupportedModelError
        There is none, one has no config, one caps its logits, which would cap weights too, or one
        has an indexer, which masks what it has not chosen under the backends that it knows alone.
    """
    # Wrappers, such as torch.compile's, show the attributes of the module inside as well.
    modules = [m for layer in layers for m in layer.modules() if "layer_idx" in vars(m)]
    found: list[Any] = [m for m in modules if hasattr(m, "is_causal")]
    if not found or any(getattr(m, "indexer", None) for m in found):
        names = " and ".join(sorted({type(m).__name__ for m in found or modules}))
        raise UnsupportedModelError(
            f"merge=True: the weights of merged tokens do not reach the attention of {names}. "
            "Use merge=False."
        )
    for module in found:
        if getattr(module, "attn_logit_softcapping", None):
            raise UnsupportedModelError(
                f"merge=True: {type(module).__name__} caps its attention logits "
                "(attn_logit_softcapping of its config), and the weights of merged tokens would be "
                "capped with them. Use merge=False."
            )
        if getattr(module, "config", None) is None:
            raise UnsupportedModelError(
                f"merge=True: {type(module).__name__} has no config that names its attention "
                "backend, so the weights of merged tokens cannot reach it. Use merge=False."
            )
    return found


def reads_backend(module: Any) -> bool:
    """Whether the code of an attention module reads the backend that its config names.

    Attention of remote code may compute everything by itself, and then no weights reach it.
    """
    owners = [vars(module), *map(vars, type(module).__mro__)]
    for forward in (owner["forward"] for owner in owners if "forward" in owner):
        names = getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())
        if "_attn_implementation" in names:
            return True
        if "super" not in names:
            return False
    return False


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the user's backend on widened tensors, in place of a patched module's attention.

    It takes queries (B, H, q, d), keys and values (B, kv heads, k, d), and gives (B, q, H, d) and
    the backend's attention weights or None, as every attention function of transformers.
    """
    config, plain, more = module.config, module, None
    scale, dim = query.shape[-1] ** -0.5 if scaling is None else scaling, value.shape[-1]
    if isinstance(config, AttributeView):  # else it has left since, with another thread's prompt
        plain = AttributeView(module, config=config.tokencomp_original)
        more = config.tokencomp_bias_dims(module.layer_idx, query, key, scale)
    if more is not None:
        query, key, value = widen(query, key, value, more)
        scaling = scale
    backend = compat.attention_function(module, plain.config)
    out, weights = backend(plain, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return out if more is None else out[..., :dim].contiguous(), weights


def bias_dims(query: Tensor, key: Tensor, sizes: Tensor, scaling: float) -> BiasDims:
    """Dimensions by which scaling · q·k grows by the log(size) of every key.

    The head dimension grows to the next multiple of 8 that has two more dimensions. The first holds
    the logarithm in the dtype of the keys, and the second the part that rounding removed from it.

    Parameters
    ----------
    query : Tensor, shape (B, H, q, d)
    key : Tensor, shape (B, kv heads, k, d)
    sizes : Tensor of float32, shape (B, m), m ≤ k
        Number of tokens that each of the first m keys stands for; the other keys stand for one.

    Returns
    -------
    Further
        For every query, (more,), and for every key, (B, 1, k, more), in their dtypes.
    """
    rows, extra = key.shape[-2], extra_dims(query.shape[-1])
    factor = 2.0 ** round(-math.log2(scaling))  # a power of two is exact in every dtype
    log_sizes = sizes.to(key.device).float().log() / (scaling * factor)
    log_sizes = nn.functional.pad(log_sizes, (0, rows - log_sizes.shape[1]))
    high = log_sizes.to(key.dtype)
    of_keys = key.new_zeros(key.shape[0], 1, rows, extra)
    of_keys[:, 0, :, 0], of_keys[:, 0, :, 1] = high, log_sizes - high.float()
    of_queries = query.new_zeros(extra)
    of_queries[:2] = factor
    return BiasDims(of_queries, of_keys)


def widen(
    query: Tensor, key: Tensor, value: Tensor, more: BiasDims
) -> tuple[Tensor, Tensor, Tensor]:
    """Add further dimensions to queries and keys, and zeros to values.

    Some backends require equal head dimensions.
    """
    extra = more.of_queries.shape[0]
    return (
        torch.cat([query, more.of_queries.expand(*query.shape[:-1], extra)], dim=-1),
        torch.cat([key, more.of_keys.expand(*key.shape[:-1], extra)], dim=-1),
        nn.functional.pad(value, (0, query.shape[-1] + extra - value.shape[-1])),
    )


def extra_dims(dim: int) -> int:
    """Dimensions that heads of `dim` dimensions get for the weights of rows: at least two."""
    return -(-(dim + 2) // MULTIPLE) * MULTIPLE - dim
