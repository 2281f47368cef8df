"""Decoder calls with a compressed cache, and chunked prefill.

The cache layers know their rows and the length of the sequence (`tokencomp.engine.cache`). Later
tokens only need the right mask:

    one token, no padding, no window     no mask: it attends to all rows; where tokens were merged,
                                         the logarithms of the weights
    one token on a static cache          a mask of constant shape, without a host read
    anything else                        `Masks` of a `Call`: here of segment 0; the hooks of
                                         the layers ask for those of other segments (`layers.py`)

Masks also add log(weight) of merged rows, or heads are widened: `tokencomp.engine.weights.carrier`
decides.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache import CompressedLayer, CompressedStaticLayer, first_layer
from tokencomp.engine.call import Call, RunningCalls, build_segments
from tokencomp.engine.checks import check_windows
from tokencomp.engine.gather import gather_arguments
from tokencomp.engine.lengths import check_turn
from tokencomp.engine.masks import Masks, read_mask
from tokencomp.engine.rowmap import RowMap
from tokencomp.engine.weights import Carrier, RowWeights, carrier
from tokencomp.errors import PrefillWarning
from tokencomp.plan.plan import Plan
from tokencomp.tokens.tokens import CODES, MODALITIES, Modality
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.masks import StaticMaskView, causal_mask, weighted_mask
from tokencomp.torchlib.replace import MethodReplacement

MASKLESS = re.compile("sdpa|flash")  # backends that take None if a token attends to all rows
PREFILL = "_prefill"  # method of transformers' generation that runs the prefill


class LaterTokens:
    """Prepares the arguments of decoder calls with a compressed cache."""

    def __init__(
        self, adapter: Adapter, calls: RunningCalls, compact: bool, weights: RowWeights
    ) -> None:
        self.adapter, self.calls, self.compact = adapter, calls, compact
        self._weights = weights
        self._copies_keys = compat.copies_grouped_keys(adapter.text_config)

    def traceable(self, inputs: Mapping[str, Any], stages: bool) -> bool:
        """Whether torch.compile can trace our part of a call: tensor operations, or nothing.

        True for a decode step on a static cache, and without `stages` for all caches that are not
        compressed. All that this method reads is constant for Dynamo. `inputs` are arguments of the
        model, its body or its decoder.
        """
        if not torch.compiler.is_compiling():
            return False
        layer = first_layer(compat.get_cache(inputs))
        if not isinstance(layer, CompressedStaticLayer):
            return not stages and not isinstance(layer, CompressedLayer)
        weighted = layer.row_map.weights is not None
        if weighted and self._carrier(layer.keys, masked=True).numbers is None:
            return False  # heads are widened between the graphs
        return _width(inputs) == 1 and not self.adapter.feature_modalities(inputs)

    def prepare(self, kwargs: dict[str, Any], layers: list[Any], first: Any) -> None:
        """Set mask and compact positions of a call in place; `first`: first layer with rows."""
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.adapter.decoder.embed_tokens(kwargs["input_ids"])
            kwargs["input_ids"] = None
        first.check_patch()
        if not torch.compiler.is_compiling():
            check_turn(compat.get_cache(kwargs), first, kwargs)
        x, static = kwargs["inputs_embeds"], isinstance(first, CompressedStaticLayer)
        single, weighing = x.shape[1] == 1, None
        if _weighted([first] if static else layers):
            weighing = self._carrier(x, masked=static or not single)
        widens = weighing is not None and weighing.numbers is None
        # The decode step of compiled graphs: no host read, constant shapes.
        if single and static and not widens:
            self._static_step(kwargs, first, weighing)
            return
        positions = kwargs.get("position_ids")
        # With four rows of positions, the first counts text tokens; the rotary embedding reads 3.
        rows = self.adapter.mrope_rows
        if rows and positions is not None and positions.ndim == 3 and len(positions) > rows:
            kwargs["position_ids"] = positions[-rows:]
        numbers = None if weighing is None else weighing.numbers
        # From the cheapest case to the general one, see the table above.
        sees_all = single and self._attends_to_all(layers, first)
        if sees_all and weighing is None:
            kwargs["attention_mask"] = None
        elif sees_all and numbers is not None and _takes_one_mask(layers, first):
            kwargs["attention_mask"] = first.row_map.log_weights(first.rows + 1, numbers)
        else:
            self._turn(kwargs, layers, first, weighing)

    def _carrier(self, x: Any, masked: bool) -> Carrier:
        """What carries the weights in a call; x has its device and dtype."""
        backend = compat.attention_implementation(self.adapter.text_config)
        return carrier(backend, x.device.type, x.dtype, masked, self._copies_keys)

    def _attends_to_all(self, layers: list[Any], first: Any) -> bool:
        """Whether a single token attends to all rows, and the backend then needs no mask."""
        backend = compat.attention_implementation(self.adapter.text_config)
        types = None if first.owner is None else first.owner.types
        if self.compact or types is None or MASKLESS.search(backend) is None:
            return False
        for layer in layers:  # a plain loop: runs for every token
            if isinstance(layer, CompressedLayer) and layer.row_map.real is not None:
                return False
            if types.all_full and isinstance(layer, DynamicSlidingWindowLayer):
                return False
        # transformers skips masks only below the window, so at the window we build one too.
        return bool(types.unmasked and first.get_seq_length() + 1 < types.smallest)

    def _static_step(self, kwargs: dict[str, Any], layer: Any, weighing: Carrier | None) -> None:
        """Prepare one token on a static cache, without a host read and with constant shapes.

        Without padding rows transformers' mask is right: the cache layer says that row 0 is at
        entry `dropped` of the 2-D mask, and the token at entry `dropped` + written rows, so that
        unwritten rows are in the future. With padding rows we build the mask from `real`, with
        entry i for row i; for merged rows (`weighing`) it adds log(weight). FlashAttention gets a
        2-D mask without padding and unwritten rows.
        """
        x, config = kwargs["inputs_embeds"], self.adapter.text_config
        if "flash" in compat.attention_implementation(config):
            kwargs["attention_mask"] = layer.written_rows(x.shape[0])
        elif weighing is not None:
            written = layer.written_rows(x.shape[0])[:, None, None]
            logs = layer.row_map.log_weights(layer.max_cache_len, weighing.numbers)
            kwargs["attention_mask"] = weighted_mask(written, logs)
        elif layer.row_map.real is not None:
            view = StaticMaskView(layer.max_cache_len, written=layer.cumulative_length)
            kwargs["attention_mask"] = causal_mask(config, x, layer.row_map.real, view)
        if self.compact:
            kwargs["position_ids"] = layer.real_rows().expand(x.shape[0], 1)

    def _turn(
        self, kwargs: dict[str, Any], layers: list[Any], first: Any, weighing: Carrier | None
    ) -> None:
        """Prepare any number of tokens, with or without padding and segments.

        `weighing`: what carries the weights of merged rows; None: there are none.
        """
        x, cache = kwargs["inputs_embeds"], compat.get_cache(kwargs)
        n, real, prepared = x.shape[1], None, None
        if n > 1:  # a single token is neither padding nor part of an image
            mask, prepared = read_mask(kwargs, first, self.calls.state.noted.mask)
            real = None if mask is None else mask[:, -n:].bool()
            real = None if real is None or bool(real.all()) else real
        # An empty plan: these tokens are not compressed, and cache layers say where segments start.
        new = RowMap(n, real=real)
        segments = build_segments(Plan(), len(layers), layers, mask=None, new=new)
        call = Call(
            self.adapter, Plan(), [], n, segments, new, cache, not self.compact, prepared
        )  # fmt: skip
        call.numbers = None if weighing is None else weighing.numbers
        check_windows(call)
        if self.compact:
            kwargs["position_ids"] = segments[0].contiguous_positions(real, x)
        if len(segments) > 1 and "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = 0  # layers with shared keys would get only the last rows
        kwargs["attention_mask"] = Masks(call, real).decoder_mask(x)
        self.calls.state.call = call
        if weighing is not None and weighing.numbers is None:
            call.weighing = self._weights.begin()


def _weighted(layers: list[Any]) -> bool:
    """Whether a cache layer holds merged tokens."""
    for layer in layers:  # a plain loop: runs for every token
        row_map = getattr(layer, "row_map", None)
        if row_map is not None and row_map.weights is not None:
            return True
    return False


def _takes_one_mask(layers: list[Any], first: Any) -> bool:
    """Whether the weights of the first layer are those of all, and its mask fits all."""
    for layer in layers:  # a plain loop: runs for every token
        if getattr(layer, "starts_segment", False):
            return False
    all_full: bool = first.owner.types.all_full
    return all_full


def _width(inputs: Mapping[str, Any]) -> int:
    """Number of columns of a call; 0 if its arguments do not show it."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[1])
    return 0


ANY: frozenset[Modality] = frozenset(CODES)


def media_apart(adapter: Adapter, inputs: Mapping[str, Any]) -> frozenset[Modality]:
    """Modalities of the media that a call brings past all stages; any, if it has no ids."""
    if inputs.get("input_ids") is None:
        return ANY
    return frozenset(MODALITIES[code] for code in adapter.feature_modalities(inputs))


def begins_prompt(inputs: Mapping[str, Any]) -> bool:
    """Whether a call is the first of its prompt: there is no cache, or it is empty.

    False for continuous batching, which mixes prompts and later tokens in a call; and for a single
    token on a static cache, whose length is not read from the device.
    """
    # No cache, so that every call is a whole sequence.
    cache = compat.get_cache(inputs)
    if cache is None:
        return True
    if isinstance(first_layer(cache), StaticLayer) and _width(inputs) == 1:
        return False
    return hasattr(cache, "get_seq_length") and not int(cache.get_seq_length())


# -- chunked prefill -----------------------------------------------------------------------------


class ChunkedPrefill(Hooked):
    """Applies `prefill_chunk_size` of `generate` after the entry stage.

    Transformers would cut the prompt before the model: a boundary could split a span, and a reducer
    would not see the question. Here the vision tower and the entry stage see the whole prompt once,
    and the decoder processes the kept rows in chunks, which bounds the memory of attention and
    MLPs.

    Text-only prompts, and all prompts while compression is off (`active()` is False), are chunked
    by transformers. In releases without the replaced method, prompts with media are not chunked.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls, active: Callable[[], bool]) -> None:
        self.adapter, self.calls, self.active = adapter, calls, active

    def install(self) -> None:
        """Replace `model._prefill`, if the release has it."""
        self._handles.append(MethodReplacement(self.adapter.top, PREFILL, self._prefill))

    def _prefill(
        self,
        original: Callable[..., Any],
        input_ids: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        size = getattr(generation_config, "prefill_chunk_size", None)
        original = functools.partial(original, input_ids)
        media = size is not None and self.adapter.feature_modalities(model_kwargs)
        # transformers raises for chunks without a cache
        if not (media and self.active()) or compat.get_cache(model_kwargs) is None:
            return original(generation_config, model_kwargs, *args, **kwargs)
        # One pass for transformers; `DecoderHooks._run_chunks` cuts it after the entry stage.
        whole = copy.copy(generation_config)
        whole.prefill_chunk_size = None
        noted = self.calls.state.noted
        noted.chunk = size
        for option in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, option, False):
                _one_pass(size, f"{option}=True needs every column of one pass")
                noted.chunk = None
        try:
            return original(whole, model_kwargs, *args, **kwargs)
        finally:
            noted.chunk = None


def in_chunks(call: Call, kwargs: dict[str, Any], size: int) -> bool:
    """Whether a compressed prompt runs in chunks of `size` rows; warns if that is not possible.

    `kwargs`: arguments of the decoder for the whole compressed prompt.
    """
    if call.map.rows <= size:
        return False
    mask = kwargs.get("attention_mask")
    if len(call.segments) > 1:
        _one_pass(size, "this plan drops tokens between decoder layers, which need all rows")
    elif mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        _one_pass(size, "the masks of windows or image blocks are made for the whole prompt")
    else:
        return True
    return False


def chunk_arguments(kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Arguments of the decoder for rows `start … stop - 1`."""
    x, mask, chunk = kwargs["inputs_embeds"], kwargs.get("attention_mask"), dict(kwargs)
    batch, width = x.shape[:2]
    chunk["inputs_embeds"] = x[:, start:stop]
    chunk["position_ids"] = kwargs["position_ids"][..., start:stop]
    # Keys of earlier turns, earlier chunks and this chunk.
    if mask is not None:
        chunk["attention_mask"] = mask[:, : mask.shape[1] - (width - stop)]
    if kwargs.get("cache_position") is not None:
        chunk["cache_position"] = kwargs["cache_position"][start:stop]
    # Per-layer inputs and deepstack features of these rows.
    index = torch.arange(start, stop, device=x.device).expand(batch, -1)
    gather_arguments(chunk, index, None, width)
    return chunk


def _one_pass(size: Any, why: str) -> None:
    """Warn that a prompt is not chunked."""
    warnings.warn(
        f"prefill_chunk_size={size} is not applied to a prompt with media: {why}. The prompt runs "
        "in one pass. Use an entry reducer, or leave the option out.",
        PrefillWarning,
        stacklevel=3,
    )
