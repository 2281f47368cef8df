"""The kinds of a decoder's layers, and how far back those with an attention window see."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.layer_types.registry import (
    CONVOLVING,
    FULL,
    LAYER_TYPES,
    SLIDING,
    LayerType,
    State,
)
from tokencomp.errors import RowIndexedAttentionError, UnsupportedModelError
from tokencomp.torchlib import compat

# Fields of configs that let attention depend on the numbers of rows, where they are above 1.
BY_ROW = {
    "index_kpool": "an indexer scores pools of {} consecutive rows",
    "indexer_compress_ratio": "an indexer scores groups of {} consecutive rows",
    "index_block_size": "sparse layers choose blocks of {} consecutive rows",
}
BLOCKS = "minimax_m3_sparse"


@dataclass(frozen=True)
class LayerTypes:
    """Kinds of the decoder layers, and the windows among them.

    Attributes
    ----------
    types
        Of every layer.
    sizes
        By the name of a kind: tokens that a query sees at most, itself included, or tokens per
        chunk.
    named
        Whether the config names the kinds, so that the decoder takes a mask for each.
    cut
        Rows that a default cache keeps although no layer has a window (a `sliding_window` that
        layers like those of Llama do not read); None: all.
    convolves
        Whether layers with attention also hold short convolutions, which take a mask of their own.
    relative
        Whether attention has a bias by distance, see `tokencomp.engine.layer_types.relative`.
    """

    types: tuple[LayerType, ...]
    sizes: Mapping[str, int]
    named: bool
    cut: int | None = None
    convolves: bool = False
    relative: bool = False

    @classmethod
    def of(cls, decoder: Any, served: bool = False) -> LayerTypes:
        """The windows of a decoder.

        The config is read in every call, because the sizes in it may change. Layers that are known
        to be `served`, because the patch has checked them before, are not checked again.
        """
        config, cut = decoder.config, None
        names = tuple(getattr(config, "layer_types", None) or ())[: len(decoder.layers)]
        if not served:
            _refuse_types(decoder, names)
        types = names
        if not names:
            # Some decoders whose config names no kinds (Mistral) apply `sliding_window`, others
            # (Llama) only let the cache read it. The former import the factory of such masks.
            factory, size = "create_sliding_window_causal_mask", _size(config, SLIDING)
            applies = size is not None and compat.file_with(type(decoder), factory) is not None
            types = (SLIDING.name if applies else FULL.name,) * len(decoder.layers)
            cut = None if applies else size
        windowed = [k for k in map(LAYER_TYPES.__getitem__, dict.fromkeys(types)) if k.window_field]
        sizes = tuple([(layer_type.name, _size(config, layer_type)) for layer_type in windowed])
        relative = isinstance(getattr(config, "rel_extent", None), int)
        return _layer_types(types, sizes, bool(names), cut, relative)

    @cached_property
    def smallest(self) -> float:
        """The size of the smallest window: all layers see the whole of sequences up to this."""
        return min(self.sizes.values(), default=math.inf)

    def rows_kept(self, layers: Sequence[Any]) -> int | None:
        """Rows that a cache keeps of decoder layers that attend to all; None: all of them."""
        pairs = zip(layers, self.types, strict=False)
        cuts = [
            layer.sliding_window
            for layer, layer_type in pairs
            if layer_type is FULL and isinstance(layer, DynamicSlidingWindowLayer)
        ]
        return min(cuts) if cuts else self.cut

    @cached_property
    def plain(self) -> bool:
        """Whether every layer attends to all tokens before it."""
        return set(self.types) == {FULL}

    @cached_property
    def linear(self) -> bool:
        """Whether a layer keeps a state, instead of rows or beside them."""
        return self.convolves or any(isinstance(layer_type, State) for layer_type in self.types)

    @cached_property
    def count_from_start(self) -> bool:
        """Whether a window is counted from the first real column of every sample."""
        return any(
            layer_type.counts_from_start
            for layer_type in self.types
            if layer_type.name in self.sizes
        )

    @cached_property
    def masks_single_tokens(self) -> bool:
        """Whether the decoder builds a mask for a single token, too."""
        return any(layer_type.masks_single_tokens for layer_type in self.types)

    @cached_property
    def cut_later_turns(self) -> bool:
        """Whether a layer keeps only the first prompt whole."""
        return any(layer_type.cuts_later_turns for layer_type in self.types)


@functools.lru_cache(maxsize=64)  # what follows from the kinds is computed once
def _layer_types(
    names: tuple[str, ...],
    sizes: tuple[tuple[str, int | None], ...],
    named: bool,
    cut: int | None,
    relative: bool,
) -> LayerTypes:
    types = tuple(LAYER_TYPES[name] for name in names)
    own = {name: int(size) for name, size in sizes if size}
    return LayerTypes(types, own, named, cut, not CONVOLVING.keys().isdisjoint(names), relative)


def _size(config: Any, layer_type: LayerType) -> int | None:
    """The one size of all windows of a kind with a window; None: the config gives none."""
    if layer_type is SLIDING and getattr(config, "use_sliding_window", True) is False:
        return None
    field = str(layer_type.window_field)
    found: set[int] = {size for size in compat.layer_values(config, field) if size}
    if len(found) > 1:
        sizes = ", ".join(map(str, sorted(found)))
        raise UnsupportedModelError(
            f"{field} of the layers is {sizes}. Served are decoders whose windows have "
            "one size. Run it without patch()."
        )
    return found.pop() if found else None


def _refuse_types(decoder: Any, types: Sequence[str]) -> None:
    """Refuse unknown layer types, and attention that a drop would change for other tokens."""
    for name, reason in BY_ROW.items():
        values = [v for v in compat.layer_values(decoder.config, name) if isinstance(v, int)]
        value = max(values, default=0)
        if value <= 1:
            continue
        if name == "index_block_size" and BLOCKS not in types:
            continue
        raise RowIndexedAttentionError(
            f"{type(decoder).__name__}: {reason.format(value)} ({name} of its config), so that "
            "dropping a token would not equal masking it: the rows behind it would count "
            "differently. Run it without patch()."
        )
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has {', '.join(unknown)} layers, for "
            "which it is not checked that dropping a token equals masking it. Served are "
            f"{', '.join(sorted(LAYER_TYPES))}. Run it without patch()."
        )


def check_windows(
    decoder: Any,
    layer_types: LayerTypes,
    length: int,
    by_column: bool,
    packed: bool = False,
    layers: Sequence[Any] = (),
) -> None:
    """Refuse a compressed sequence whose windows the model would apply wrongly.

    Parameters
    ----------
    length
        Tokens of the sequence after this call, in the positions that the rotary embedding uses:
        dropped ones count unless positions are compact.
    by_column
        Whether windows are measured in columns of the uncompressed sequence.
    packed
        Whether rows hold several prompts.
    layers
        Of the cache of the call.
    """
    cut = layer_types.rows_kept(layers)
    if cut is not None and length >= cut:
        raise UnsupportedModelError(
            f"the sequence has {length} tokens, and the cache keeps the last {cut} only "
            f"(sliding_window={cut} of the config or of the cache), although layers attend to all. "
            f"Give fewer than {cut} tokens in all, turn compression off with handle.disabled(), or "
            "set model.config.get_text_config().sliding_window = None and pass no cache."
        )
    if length <= layer_types.smallest:
        return
    backend = compat.attention_implementation(decoder.config)
    if by_column and "flash" in backend:
        raise UnsupportedModelError(
            f"the sequence has {length} tokens and {type(decoder).__name__} layers with a window "
            f"of {layer_types.smallest}. The backend {backend} counts the window in rows, "
            'of which there are fewer than positions now. Use attn_implementation="sdpa", or '
            'patch(..., positions="compact").'
        )
    if packed:
        raise UnsupportedModelError(
            f"rows hold several prompts and {length} tokens, more than the attention window of "
            f"{layer_types.smallest}. Give one prompt per row, or turn compression off "
            "with handle.disabled()."
        )
