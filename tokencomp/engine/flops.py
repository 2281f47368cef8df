"""FLOPs and KV bytes of decoder layers, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Kinds of layers without keys: linear attention, short convolution, and MLPs alone.
NO_ATTENTION = frozenset({"linear_attention", "conv", "moe", "mlp"})


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder (gated MLP, grouped-query attention).

    Attributes
    ----------
    reach
        Per layer: tokens that a query sees at most; None: all; 0: the layer has no attention, so
        that its cost is linear. Empty: all layers see all tokens.
    stored
        Per layer: numbers of the keys and values of one token that the layer caches: none for
        layers with a state of constant size, or with the keys of another layer. Empty: all cache
        their own.
    """

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2
    reach: tuple[int | None, ...] = ()
    stored: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: Any, itemsize: int = 2) -> DecoderShape:
        """Sizes of a transformers text config."""
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        kinds = list(getattr(config, "layer_types", None) or ())[:layers]
        shared = list(getattr(config, "kv_sharing_modes", None) or ())[:layers]
        windows = {
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        reach = tuple(0 if kind in NO_ATTENTION else windows.get(kind) for kind in kinds)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        # Full layers may have heads of another size (Gemma 4).
        wide = (getattr(config, "num_global_key_value_heads", None) or kv_heads) * (
            getattr(config, "global_head_dim", None) or head_dim
        )
        stored = [2 * (wide if size is None else kv_heads * head_dim) for size in reach]
        stored = [0 if size == 0 else n for n, size in zip(stored, reach, strict=True)]
        for i, mode in enumerate(shared[: len(stored)]):
            stored[i] = 0 if mode == "reuse" else stored[i]
        return cls(
            num_layers=layers,
            hidden=config.hidden_size,
            intermediate=_one(config.intermediate_size),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            itemsize=itemsize,
            reach=reach,
            stored=tuple(stored),
        )

    @property
    def linear_flops_per_token(self) -> int:
        """2 × weights of q, k, v, o and the three MLP matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    def layer_flops(self, tokens: int, past: int = 0, layer: int | None = None) -> int:
        """FLOPs of one layer for `tokens` new tokens after `past` cached ones.

        Causal attention counts the visible half: 4 · heads · head_dim per (query, key) pair.

        Parameters
        ----------
        layer
            Number of the layer; None: one that sees all tokens.
        """
        reach = self.reach[layer] if layer is not None and self.reach else None
        pairs = tokens * past + tokens * (tokens + 1) // 2
        if reach is not None:  # the first queries see fewer than the window holds
            growing = min(max(reach - past, 0), tokens)
            pairs = growing * past + growing * (growing + 1) // 2 + (tokens - growing) * reach
        attention = 4 * self.heads * self.head_dim * pairs
        return tokens * self.linear_flops_per_token + attention

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in one layer that caches all of its own."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    def kv_bytes(self, tokens: int, layer: int) -> int:
        """Bytes of keys and values that a layer caches for a prompt of `tokens` tokens."""
        if not self.stored:
            return tokens * self.kv_bytes_per_token
        reach = self.reach[layer]
        rows = tokens if reach is None else min(tokens, max(reach - 1, 0))
        return rows * self.stored[layer] * self.itemsize


def _one(size: Any) -> int:
    """A size, or the mean of the sizes of all layers."""
    return sum(size) // len(size) if isinstance(size, list | tuple) else size
