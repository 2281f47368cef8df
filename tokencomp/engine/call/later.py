"""Decoder calls on a cache that holds a compressed prompt.

Later tokens need no work of their own but the right mask; where rows lie and how long the sequence
is, the cache layers know themselves (`tokencomp.engine.cache.layers`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache.layers import CompressedLayer
from tokencomp.engine.cache.rows import first_layer, flash_on_static, segment_heads
from tokencomp.engine.cache.static import CompressedStaticLayer
from tokencomp.engine.call.state import RunningCalls
from tokencomp.engine.layer_types import mask_compat
from tokencomp.engine.layer_types.prepared_mask import read_mask
from tokencomp.engine.layer_types.types import LayerTypes, check_windows
from tokencomp.engine.rows.layout import RowLayout
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.engine.stage.segments import Segment
from tokencomp.torchlib import compat

MASKLESS = re.compile("sdpa|flash")  # backends that take None where a token attends to all


class LaterTokens:
    """Arguments of decoder calls whose cache holds a compressed prompt.

    Parameters
    ----------
    calls
        Gets `forward` or `cached` for the running call.
    compact_positions
        Whether positions count the kept tokens only.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls, compact_positions: bool) -> None:
        self.adapter, self.calls, self.compact_positions = adapter, calls, compact_positions
        mask_compat.mask_parameters()  # before a step is compiled

    def traceable(self, inputs: Mapping[str, Any], stages: bool) -> bool:
        """Whether torch.compile can trace our part of a call: tensor operations, or nothing.

        True in a decode step on a static cache, and without `stages` wherever no earlier plan has
        left a compressed cache. Everything that this method reads is a constant to Dynamo.
        `inputs` are arguments of the model, its body or its decoder.
        """
        if not torch.compiler.is_compiling():
            return False
        layer = first_layer(compat.get_cache(inputs))
        if not isinstance(layer, CompressedStaticLayer):
            return not stages and not isinstance(layer, CompressedLayer)
        return _columns(inputs) == 1 and not self.adapter.feature_modalities(inputs)

    def prepare(self, kwargs: dict[str, Any], layers: list[Any], first: Any) -> None:
        """Set the mask (and compact positions) of a call in place.

        One token on a cache without padding needs no mask, because it attends to every row. `first`
        is the first of the cache's layers that holds rows.
        """
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.adapter.decoder.embed_tokens(kwargs["input_ids"])
            kwargs["input_ids"] = None
        first.check_patch()
        single = kwargs["inputs_embeds"].shape[1] == 1
        if single and isinstance(first, CompressedStaticLayer):
            self._static_step(kwargs, first)
            return
        positions = kwargs.get("position_ids")
        # A row before those that the rotary embedding reads counts text tokens.
        rows = self.adapter.mrope_rows
        if rows and positions is not None and positions.ndim == 3 and len(positions) > rows:
            kwargs["position_ids"] = positions[-rows:]
        backend = compat.attention_implementation(self.adapter.text_config)
        maskless = single and MASKLESS.search(backend) is not None
        if maskless and first._valid is None and first.seen_below > first.get_seq_length():
            kwargs["attention_mask"] = None
        else:
            self._continue(kwargs, layers, first, maskless)

    def _static_step(self, kwargs: dict[str, Any], layer: Any) -> None:
        """Prepare one token on a static cache, without a host read and with constant shapes.

        As long as the cache has no padding, transformers' own mask is right: it takes the logical
        columns of the first row and of the token from the cache. With padding, a mask over the
        whole length of the layer is built, from which `MaskView.written` hides unwritten rows.
        FlashAttention always gets one, of two axes.
        """
        x, config = kwargs["inputs_embeds"], self.adapter.text_config
        if flash_on_static(config, layer):
            kwargs["attention_mask"] = layer.written_rows(x.shape[0])
        elif layer.unpadded is not None:
            view = mask_compat.MaskView(layer.max_cache_len, written=layer.cumulative_length)
            kwargs["attention_mask"] = mask_compat.causal_mask(config, x, layer.unpadded, view)
        if self.compact_positions:
            kwargs["position_ids"] = layer.real_rows().expand(x.shape[0], 1)

    def _continue(
        self, kwargs: dict[str, Any], layers: list[Any], layer: Any, maskless: bool
    ) -> None:
        """Any number of tokens, padded or not, on layers that hold the same rows or other ones.

        `maskless` says that it is a single token, and that the attention backend needs no mask
        where this token attends to all rows.
        """
        x, n = kwargs["inputs_embeds"], kwargs["inputs_embeds"].shape[1]
        past = layer.rows if self.compact_positions else layer.get_seq_length()
        layer_types, total = LayerTypes.of(self.adapter.decoder, served=True), int(past) + n
        by_column = not self.compact_positions
        check_windows(self.adapter.decoder, layer_types, total, by_column)
        new, prepared = None, None  # a single token is never padding, nor a part of a picture
        if n > 1:
            new, prepared = self._columns_of_call(kwargs, n, layer)
        if self.compact_positions:
            before = Segment.after(layer, 0, 1, RowLayout(n, [], []))
            kwargs["position_ids"] = before.contiguous(new, x)
        # One token attends to every row, so without padding it needs no mask.
        maskless = maskless and all(layer.valid is None for layer in segment_heads(layers))
        # transformers leaves a mask out only below the window, so at the window it is ours too.
        plain = not (layer_types.masks_single_tokens or layer_types.relative)
        if maskless and total < layer_types.smallest and plain:
            kwargs["attention_mask"] = None
            return
        forward = ForwardPass.continuation(self.adapter, layers, new, n)
        forward.by_column, forward.prepared = by_column, prepared
        source, first = forward.mask_source(new, compat.get_cache(kwargs)), forward.segments[0]
        explicit = source.explicit(first, total)
        if maskless and not explicit and len(forward.segments) == 1 and not layer_types.relative:
            kwargs["attention_mask"] = None
            return
        if len(forward.segments) > 1 and "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = 0  # layers with shared keys would get the last rows alone
        if explicit:
            kwargs["attention_mask"] = source.decoder_mask(first, x)
        else:
            config = self.adapter.text_config
            kwargs["attention_mask"] = first.call_mask(config, layer, new, x)
        self.calls.state.forward = forward

    def _columns_of_call(
        self, kwargs: Mapping[str, Any], n: int, layer: Any
    ) -> tuple[Tensor | None, Any]:
        """Which of the `n` columns of a call are real, and what the body prepared for them."""
        body = self.calls.state.body_mask
        mask, prepared = read_mask(kwargs.get("attention_mask"), body, n, layer.rows)
        new = None if mask is None else mask[:, -n:].bool()
        return (None if new is None or bool(new.all()) else new), prepared


def _columns(inputs: Mapping[str, Any]) -> int:
    """Columns of a call; 0 where its arguments do not say."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[1])
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
