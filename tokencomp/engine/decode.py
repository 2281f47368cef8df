"""Decoder calls on a cache that holds a compressed prompt, and what a prefill leaves in it.

Later tokens need no work of their own but the right mask; where rows lie and how long the sequence
is, the cache layers know themselves (`tokencomp.engine.cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from tokencomp.adapters.base import Adapter
from tokencomp.engine import compat
from tokencomp.engine.cache import (
    CompressedLayer,
    CompressedStaticLayer,
    check_cache,
    compress_layer,
    physical_length,
)
from tokencomp.engine.forward import ForwardPass
from tokencomp.engine.layout import RowLayout
from tokencomp.engine.prepared_mask import padding_of
from tokencomp.engine.segments import Segment
from tokencomp.engine.window import check_attention_window

MASKLESS = ("sdpa", "flash")


class LaterTokens:
    """Arguments of decoder calls whose cache holds a compressed prompt.

    Parameters
    ----------
    local
        State of the calling thread; `forward` or `cached` is set on it for the running call.
    compact_positions
        Whether positions count real rows only.
    proportional
        Whether attention reads how many tokens the cached rows stand for.
    install_layers
        Called when layers of the cache hold different rows, which needs hooks on every layer.
    """

    def __init__(
        self,
        adapter: Adapter,
        local: Any,
        compact_positions: bool,
        proportional: bool,
        install_layers: Callable[[], None],
    ) -> None:
        self.adapter, self.local = adapter, local
        self.compact_positions, self.proportional = compact_positions, proportional
        self.install_layers = install_layers
        compat.mask_parameters()  # before a step is compiled

    def traceable(self, inputs: Mapping[str, Any], stages: bool) -> bool:
        """Whether torch.compile can trace our part of a call: tensor operations, or nothing.

        True in a decode step on a static cache, and without stages wherever no earlier plan has
        left a compressed cache. Everything that this method reads is a constant to Dynamo.

        Parameters
        ----------
        inputs
            Arguments of the model, its body or its decoder, by name.
        stages
            Whether the plan has any.
        """
        if not torch.compiler.is_compiling() or self.proportional:
            return False
        layer = first_layer(compat.get_cache(inputs))
        if not isinstance(layer, CompressedStaticLayer):
            return not stages and not isinstance(layer, CompressedLayer)
        return _columns(inputs) == 1 and not self.adapter.carries_features(inputs)

    def prepare(self, kwargs: dict[str, Any], layers: list[Any]) -> None:
        """Set the mask (and compact positions) of a call in place.

        One token on a cache without padding needs no mask, because it attends to every row.
        """
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.adapter.decoder.embed_tokens(kwargs["input_ids"])
            kwargs["input_ids"] = None
        if isinstance(layers[0], CompressedStaticLayer) and kwargs["inputs_embeds"].shape[1] == 1:
            self._static_step(kwargs, layers)
        else:
            self._continue(kwargs, layers)

    def _static_step(self, kwargs: dict[str, Any], layers: list[Any]) -> None:
        """Prepare one token on a static cache, without a host read and with constant shapes.

        As long as the cache has no padding, transformers' own mask is right: it takes the logical
        columns of the first row and of the token from the cache. With padding, a mask over the
        whole length of the layer is built, from which `MaskView.written` hides unwritten rows.
        """
        layer, x = layers[0], kwargs["inputs_embeds"]
        if layer.unpadded is not None:
            view = compat.MaskView(layer.max_cache_len, written=layer.cumulative_length)
            config = self.adapter.text_config
            kwargs["attention_mask"] = compat.causal_mask(config, x, layer.unpadded, view)
        if self.compact_positions:
            kwargs["position_ids"] = layer.real_rows().expand(x.shape[0], 1)
        if self.proportional:
            self.local.cached = layers

    def _continue(self, kwargs: dict[str, Any], layers: list[Any]) -> None:
        """Any number of tokens, padded or not, on layers that hold the same rows or other ones."""
        x, n = kwargs["inputs_embeds"], kwargs["inputs_embeds"].shape[1]
        positions = kwargs.get("position_ids")
        # Of four rows, the first counts text tokens; the rotary embedding reads the other three.
        if self.adapter.mrope and positions is not None and len(positions) > 3:
            kwargs["position_ids"] = positions[-3:]
        past = layers[0].rows if self.compact_positions else layers[0].get_seq_length()
        check_attention_window(self.adapter.text_config, compat.get_cache(kwargs), int(past) + n)
        new = None  # a single token is never padding
        if n > 1:
            mask = padding_of(kwargs.get("attention_mask"), n, layers[0].rows)
            new = None if mask is None else mask[:, -n:].bool()
            new = None if new is None or bool(new.all()) else new
        if self.compact_positions:
            before = Segment.after(layers[0], 0, 1, RowLayout(n, [], []))
            kwargs["position_ids"] = before.contiguous(new, x)
        backend = compat.attention_implementation(self.adapter.text_config)
        plain = new is None and all(layer.valid is None for layer in layers)
        # One token attends to every row, so without padding it needs no mask. Backends outside of
        # `MASKLESS` may still require a tensor. `cached` stands for the ForwardPass that such a
        # call does without: proportional attention reads the sizes of the rows from it.
        if n == 1 and plain and any(name in backend for name in MASKLESS):
            kwargs["attention_mask"], self.local.cached = None, layers
            return
        forward = ForwardPass.continuation(self.adapter, layers, new, n)
        if len(forward.segments) > 1:
            self.install_layers()
        first = forward.segments[0]
        kwargs["attention_mask"] = first.padding_mask(new, x.shape[0], x.device)
        self.local.forward = forward


def first_layer(cache: Any) -> Any:
    """The first layer of a cache, or None."""
    layers = getattr(cache, "layers", None)
    return layers[0] if layers else None


def _columns(inputs: Mapping[str, Any]) -> int:
    """Columns of a call; 0 where its arguments do not say."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name].shape[1]
    return 0


def begins_prompt(inputs: Mapping[str, Any]) -> bool:
    """Whether a call is the first of its prompt: its cache is empty, or it has none.

    False for continuous batching, where a call mixes prompts and later tokens; and for one token
    on a static cache, whose length is on the device, where reading it would wait for every token.
    """
    cache = compat.get_cache(inputs)
    if cache is None:
        return True
    if isinstance(first_layer(cache), StaticLayer) and _columns(inputs) == 1:
        return False
    return hasattr(cache, "get_seq_length") and not int(cache.get_seq_length())


def plain_mask(kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """Arguments of a prefill with the 2-D mask of padding, whatever was prepared from it.

    Raises
    ------
    UnsupportedCacheError
        See `padding_of`.
    """
    past, width = physical_length(first_layer(cache)), kwargs["inputs_embeds"].shape[1]
    mask = padding_of(kwargs.get("attention_mask"), width, past)
    return {**kwargs, "attention_mask": mask}


def compact_cache(forward: ForwardPass, cache: Any, proportional: bool) -> None:
    """Record in the cache layers that a prefill has filled which tokens their rows stand for.

    Parameters
    ----------
    proportional
        Whether the layers must remember how many tokens each row stands for.

    Raises
    ------
    UnsupportedCacheError
        The callee created a cache whose layers cannot be compressed.
    """
    check_cache(cache, bool(forward.plan.layer_stages))
    layers = getattr(cache, "layers", None)
    if not layers or layers[0].keys is None:  # checkpointed layers write nothing
        return
    for segment in forward.segments:
        valid = segment.all_valid(segment.layout.valid(layers[segment.first].device))
        sizes = segment.all_sizes() if proportional else None
        dropped = forward.width - segment.layout.width
        rows, columns = segment.physical + segment.layout.width, segment.all_columns(forward.width)
        for i in range(segment.first, segment.stop):
            layer = layers[i]
            own = valid if valid is None else valid.to(layer.device)
            starts = i == segment.first and i > 0
            compress_layer(layer, dropped, rows, own, starts, sizes, columns)
