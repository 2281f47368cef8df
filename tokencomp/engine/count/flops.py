"""FLOPs and KV bytes of decoder layers, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokencomp.engine.layer_types.registry import FULL, LAYER_TYPES
from tokencomp.engine.scores.proportional import extra_dims
from tokencomp.torchlib import compat


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder (gated MLP, grouped-query attention).

    Attributes
    ----------
    reach
        Tokens that a query sees at most; None: all; 0: there is no attention, so that the cost is
        linear.
    stored
        Numbers that are cached for a token, its keys and values together: none for layers with a
        state of constant size, or with the keys of another layer.
    own
        Per layer: its shape, where layers differ; empty where all are alike.
    """

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2
    reach: int | None = None
    stored: int | None = None
    own: tuple[DecoderShape, ...] = ()

    @classmethod
    def from_config(cls, config: Any, itemsize: int = 2) -> DecoderShape:
        """Sizes of a transformers text config."""
        count = config.num_hidden_layers
        types = list(getattr(config, "layer_types", None) or ())[:count]
        per_layer = compat.layer_configs(config)
        first = cls._of_layer(per_layer[0], count, itemsize)
        if len(set(types)) < 2 and not (types and LAYER_TYPES.get(types[0], FULL).window_field):
            return first
        shared = compat.kv_sharing_modes(config) or ["store"] * count
        own = []
        for name, mode, layer in zip(types, shared, per_layer, strict=False):
            shape = cls._of_layer(layer, 1, itemsize, "swa_" if name == "hybrid_sliding" else "")
            layer_type = LAYER_TYPES.get(name, FULL)
            reach = getattr(layer, layer_type.window_field or "", None) if layer_type.attends else 0
            stored = shape.stored if layer_type.attends and not str(mode).startswith("reuse") else 0
            own.append(replace(shape, reach=reach, stored=stored))
        return replace(first, own=tuple(own))

    @classmethod
    def _of_layer(cls, config: Any, count: int, itemsize: int, own: str = "") -> DecoderShape:
        """`own` is the prefix of the fields that give the heads of such layers."""
        heads = getattr(config, f"{own}num_attention_heads")
        kv_heads = getattr(config, f"{own}num_key_value_heads", None) or heads
        head_dim = getattr(config, f"{own}head_dim", None) or config.hidden_size // heads
        intermediate = getattr(config, "intermediate_size", None)
        if intermediate is None:  # experts alone
            experts = config.num_experts_per_tok * config.moe_intermediate_size
            intermediate = experts + (getattr(config, "shared_expert_intermediate_size", 0) or 0)
        if isinstance(intermediate, list | tuple):
            intermediate = sum(intermediate) // len(intermediate)
        sizes = (count, config.hidden_size, intermediate, heads, kv_heads, head_dim, itemsize)
        return cls(*sizes, stored=2 * kv_heads * head_dim)

    def layer(self, number: int | None) -> DecoderShape:
        """The shape of one layer; None: of one that is like the first and sees all tokens."""
        return self.own[number] if self.own and number is not None else self

    @property
    def linear_flops_per_token(self) -> int:
        """2 × weights of q, k, v, o and the three MLP matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    def layer_flops(
        self, tokens: int, past: int = 0, layer: int | None = None, weighted: bool = False
    ) -> int:
        """FLOPs of one layer for `tokens` new tokens after `past` cached ones.

        Causal attention counts the visible half: 4 · heads · head_dim per (query, key) pair. The
        mixer of a linear layer counts as much as the projections of attention. `weighted` rows
        take a few more dimensions per head to attention (`merge=True`).
        """
        shape = self.layer(layer)
        pairs, reach = tokens * past + tokens * (tokens + 1) // 2, shape.reach
        if reach is not None:  # the first queries see fewer than the window holds
            growing = min(max(reach - past, 0), tokens)
            pairs = growing * past + growing * (growing + 1) // 2 + (tokens - growing) * reach
        dim = shape.head_dim + (extra_dims(shape.head_dim) if weighted else 0)
        attention = 4 * shape.heads * dim * pairs
        return tokens * shape.linear_flops_per_token + attention

    def kv_bytes(self, tokens: int, layer: int | None = None) -> int:
        """Bytes of keys and values that a layer caches for a prompt of `tokens` tokens."""
        shape = self.layer(layer)
        rows = tokens if shape.reach is None else min(tokens, max(shape.reach - 1, 0))
        stored = 2 * shape.kv_heads * shape.head_dim if shape.stored is None else shape.stored
        return rows * stored * shape.itemsize
