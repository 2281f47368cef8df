"""FLOPs and KV bytes of decoder layers, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder (gated MLP, grouped-query attention)."""

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2

    @classmethod
    def from_config(cls, config: Any, itemsize: int = 2) -> DecoderShape:
        """Sizes of a transformers text config."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            itemsize=itemsize,
        )

    @property
    def linear_flops_per_token(self) -> int:
        """2 × weights of q, k, v, o and the three MLP matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    def layer_flops(self, tokens: int, past: int = 0) -> int:
        """FLOPs of one layer for `tokens` new tokens after `past` cached ones.

        Causal attention counts the visible half: 4 · heads · head_dim per (query, key) pair.
        """
        pairs = tokens * past + tokens * (tokens + 1) // 2
        attention = 4 * self.heads * self.head_dim * pairs
        return tokens * self.linear_flops_per_token + attention

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize
