"""Attention of vLLM in which a merged row weighs as much as the tokens that it represents.

The key contains the logarithm of the weight in a few additional dimensions
(`tokencomp.engine.weights`), and the KV cache stores it with the key. So decode steps, chunks of a
prompt, and prefixes from the cache need nothing else, and the cache has one row per kept token. The
kernels are those of vLLM's backends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tokencomp.engine.weights import MOST_DIMS, bias_dims, extra_dims, widen
from tokencomp.errors import UnsupportedModelError
from tokencomp.serving.vllm.checks import MERGING_BACKENDS


def note_in_compile_key(config: VllmConfig) -> None:
    """Include the wider heads in the key under which vLLM stores compiled models.

    The key includes neither processor options nor the environment. The decoder gets a copy of the
    config, so this must run before the model is built.
    """
    config.additional_config = {**config.additional_config, "tokencomp": "merge"}


def widen_attention(decoder: nn.Module, config: VllmConfig) -> Tensor:
    """Replace the attention layers of a decoder by `WeightedAttention`; return the sizes of rows.

    These are the token counts (rows,) float32 of the current step, as long as the largest step and
    in constant memory for CUDA graphs. Raises `UnsupportedModelError` for layers that cannot.
    """
    sizes = torch.ones(config.scheduler_config.max_num_batched_tokens, dtype=torch.float32)
    layers = config.compilation_config.static_forward_context
    for name, layer in list(decoder.named_modules()):
        if not isinstance(layer, AttentionLayerBase):
            continue
        check_layer(layer)
        del layers[layer.layer_name]
        parent, _, child = name.rpartition(".")
        wide = WeightedAttention(layer, sizes, config.cache_config)
        setattr(decoder.get_submodule(parent), child, wide)
    return sizes


def check_layer(layer: Any) -> None:
    """Refuse layers whose keys cannot carry a weight, or whose logits are not plain products."""
    reason = ""
    if type(layer) is not Attention:
        reason = f"{type(layer).__name__} has no keys that could carry the weights of merged tokens"
    elif layer.kv_cache_torch_dtype != torch.get_default_dtype():
        reason = (
            f"a KV cache of {layer.kv_cache_dtype} rounds the weights of merged tokens (use "
            "--kv-cache-dtype auto)"
        )
    elif layer.head_size + extra_dims(layer.head_size) > MOST_DIMS:
        reason = f"heads of {layer.head_size} dimensions have no room for weights"
    elif (
        layer.attn_type != AttentionType.DECODER
        or layer.has_sink
        or layer.kv_sharing_target_layer_name is not None
        or getattr(layer.impl, "logits_soft_cap", None)
        or getattr(layer.impl, "alibi_slopes", None) is not None
    ):
        reason = "sinks, ALiBi, capped logits and shared caches have not been tried with weights"
    if reason:
        raise UnsupportedModelError(
            f"tokencomp cannot merge in this engine: {reason}. Drop --merge."
        )


def wide_size(dim: int) -> int:
    """Size of heads of `dim` dimensions with room for weights, for which kernels exist."""
    least = dim + extra_dims(dim)
    if not current_platform.is_cpu():
        return least
    # The CPU backend has kernels for some sizes only.
    sizes = AttentionBackendEnum.CPU_ATTN.get_class().get_supported_head_sizes()
    return min(size for size in sizes if size >= least)


class WeightedAttention(Attention):
    """Attention with the arguments of the layer `plain`, and logits that grow by log(size)."""

    def __init__(self, plain: Attention, row_sizes: Tensor, cache_config: CacheConfig) -> None:
        super().__init__(
            plain.num_heads,
            wide_size(plain.head_size),
            plain.impl.scale,
            num_kv_heads=plain.num_kv_heads,
            cache_config=cache_config,
            quant_config=plain.quant_config,
            per_layer_sliding_window=plain.sliding_window,
            prefix=plain.layer_name,
        )
        if self.attn_backend.get_name() not in MERGING_BACKENDS:
            raise UnsupportedModelError(
                f"tokencomp cannot merge with {self.attn_backend.get_name()}, which vLLM takes for "
                f"heads of {self.head_size} dimensions. Drop --merge."
            )
        self.plain_size = plain.head_size
        self.register_buffer("row_sizes", row_sizes, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Run vLLM's attention on wider heads; tensors are (rows, heads · d) before and after."""
        rows = query.shape[0]
        # The shared formulas take (B, heads, rows, d): here each row is a sample with one row.
        q, k, v = (x.view(rows, -1, 1, self.plain_size) for x in (query, key, value))
        more = bias_dims(q, k, self.row_sizes[:rows, None], self.impl.scale)
        spare = self.head_size - self.plain_size - more.of_queries.shape[0]
        wide = (nn.functional.pad(x, (0, spare)).flatten(1) for x in widen(q, k, v, more))
        out = super().forward(*wide, None, output_dtype)
        return out.view(rows, -1, self.head_size)[..., : self.plain_size].flatten(1)
