"""Layer types: what each means for masks, windows and scores; and the layer types of a decoder.

A new attention kind is a subclass of `LayerType` and a row in `ROWS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokencomp.engine.cache import REFERENCE
from tokencomp.errors import RowIndexedAttentionError, UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.masks import backend_mask


@dataclass(frozen=True)
class LayerType:
    """Base class, and the type of layers with full causal attention."""

    name: str  # in configs of transformers, and among the masks of a decoder
    window_field: ClassVar[str | None] = None  # field of the text config with its size, in tokens
    attends: ClassVar[bool] = True  # with queries and keys, one row per token: it can score tokens
    skips_masks: ClassVar[bool] = True  # transformers may omit a mask that hides nothing
    masks_single_tokens: ClassVar[bool] = False  # the decoder builds a mask for a single token, too

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether an earlier key is in the window of `size` tokens of a query.

        Both are columns, and `start` is the first real column of the sample; with compact positions
        they are rows.
        """
        return True

    def needs_own_mask(self, masks: Any, segment: Any, exceeded: bool) -> bool:
        """Whether we make the mask: the one that the decoder builds from the 2-D mask is wrong.

        `exceeded`: whether the sequence after the call is longer than the window.
        """
        return False

    def mask(self, masks: Any, segment: Any, x: Tensor, text: Tensor | None) -> Any:
        """The mask of these layers in a segment.

        x (B, n, d) is read for its shape, dtype and device. `text` are positions (B, n) that
        restart at every packed prompt; without a cache.
        """
        return masks.attention_mask(self, segment, x, text)


class Sliding(LayerType):
    """Sliding window: queries see the last `size` columns, their column included."""

    window_field = "sliding_window"

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        return key > query - size

    def needs_own_mask(self, masks: Any, segment: Any, exceeded: bool) -> bool:
        """Whether a token is missing in a window: transformers' window, of rows, sees too far."""
        if not masks.call.by_column or not exceeded:
            return False
        return bool(segment.gap_within(masks.call.layer_types.sizes[self.name] - 1))


class Chunked(LayerType):
    """Chunked attention (Llama 4): queries see their chunk of `size` columns.

    Chunks are counted from the first real column of every sample (`Call.first_columns`).
    """

    window_field = "attention_chunk_size"

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        return (key - start) // size == (query - start) // size

    def needs_own_mask(self, masks: Any, segment: Any, exceeded: bool) -> bool:
        """Whether tokens are missing: transformers derives chunks from entries of the mask."""
        return exceeded and bool(segment.gap_within(math.inf))


class Indexed(LayerType):
    """Sparse attention (DeepSeek): an indexer selects rows and adds its selection to a mask."""

    skips_masks = False
    masks_single_tokens = True


class Reference(LayerType):
    """Full attention to the first prompt, and a window of later tokens (Unlimited-OCR).

    Only the window slides, and its rows have no gaps. Media of later calls are refused
    (`check_turn`).
    """

    masks_single_tokens = True

    def needs_own_mask(self, masks: Any, segment: Any, exceeded: bool) -> bool:
        """Whether rows are padded: transformers looks up padding at shifted columns."""
        return bool(segment.past.rows) and segment.past.mask() is not None

    def mask(self, masks: Any, segment: Any, x: Tensor, text: Tensor | None) -> Any:
        if not segment.past.rows:
            return super().mask(masks, segment, x, text)
        # Prompt of 4 rows, window 3, five later rows (4 … 8), one new row (9). Evicted: 4 5 6.
        # Held:
        #     0 1 2 3 | 7 8 | 9     the new row sees the prompt and 7 8 9
        # Keys 0 … 3 are real prompt rows; padding rows among them are hidden below.
        layer = segment.cached
        evicted = max(layer.cumulative_length - layer.sliding_window + 1, 0)
        rows = torch.arange(segment.past.rows + x.shape[1], device=x.device)
        prompt = rows < layer.prefill_length
        rows = rows[prompt | (rows >= layer.prefill_cumulative_length + evicted)]
        new = rows[-x.shape[1] :, None]
        near = (rows > new - layer.sliding_window) | (rows < layer.prefill_length)
        visible = (near & (rows <= new)).expand(x.shape[0], 1, -1, -1)
        valid = segment.mask(x.device)
        if valid is not None:
            visible = visible & valid[:, None, None, rows]
        return backend_mask(masks.call.adapter.text_config, visible, x)


class Mixing(LayerType):
    """No attention, only MLPs or experts."""

    attends = False


class State(Mixing):
    """Linear attention or short convolutions: a recurrent state, and a padding mask."""

    def mask(self, masks: Any, segment: Any, x: Tensor, text: Tensor | None) -> Any:
        """False at padding, (B, n); None without padding."""
        real = segment.new.mask(x.device)
        return None if real is None else real.to(x.device)


FULL = LayerType("full_attention")
SLIDING = Sliding("sliding_attention")
CHUNKED = Chunked("chunked_attention")
CONVOLUTION = State("linear_attention")  # decoders take masks of convolutions by this name
ROWS = (
    FULL,
    SLIDING,
    CONVOLUTION,
    CHUNKED,
    Indexed("indexed_attention"),
    Reference(REFERENCE),
    State("conv"),
    Mixing("moe"),
    Mixing("mlp"),
)
# Masks of attention types whose keys and values pass short convolutions.
CONVOLVING = {"hybrid": FULL, "hybrid_sliding": SLIDING}
LAYER_TYPES: dict[str, LayerType] = {
    **{layer_type.name: layer_type for layer_type in ROWS},
    **CONVOLVING,
}


# -- the layer types of a decoder -----------------------------------------------------------------

# Fields of configs: above 1, attention depends on row numbers.
BY_ROW = {
    "index_kpool": "an indexer scores pools of {} consecutive rows",
    "indexer_compress_ratio": "an indexer scores groups of {} consecutive rows",
    "index_block_size": "sparse layers choose blocks of {} consecutive rows",
}
BLOCKS = "minimax_m3_sparse"


@dataclass(frozen=True)
class LayerTypes:
    """Types of the decoder layers, and their windows."""

    types: tuple[LayerType, ...]  # of every layer
    # By name of a type: number of tokens that a query sees at most, itself included, or tokens per
    # chunk.
    sizes: Mapping[str, int]
    named: bool  # the config names the types, so that the decoder takes a mask for each
    cut: int | None = None  # of the cache, from a `sliding_window` that the layers ignore (Llama)
    convolves: bool = False  # attention layers also hold short convolutions, with another mask
    relative: bool = False  # attention has a bias by distance, see `RelativePositions`

    @classmethod
    def of(cls, decoder: Any, served: bool = False) -> LayerTypes:
        """Read the layer types of a decoder from its config, which may change between calls.

        Layers in `served` were checked when the model was patched, and are not checked again.
        """
        config, cut = decoder.config, None
        names = tuple(getattr(config, "layer_types", None) or ())[: len(decoder.layers)]
        if not served:
            _refuse_types(decoder, names)
        types = names
        if not names:
            # Among decoders without layer types in the config, some apply `sliding_window`
            # (Mistral, which imports the function for such masks); in others (Llama) only the
            # cache reads it.
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
        """Size of the smallest window: layers see all of sequences up to this length."""
        return min(self.sizes.values(), default=math.inf)

    @cached_property
    def all_full(self) -> bool:
        """Whether all layers have full causal attention."""
        return set(self.types) == {FULL}

    @cached_property
    def unmasked(self) -> bool:
        """Whether a single token needs no mask unless a window is exceeded."""
        masked = any(layer_type.masks_single_tokens for layer_type in self.types)
        return not masked and not self.relative and self.cut is None

    @cached_property
    def cut_later_turns(self) -> bool:
        """Whether only the first prompt is kept whole, so that media of later turns are refused."""
        return any(isinstance(layer_type, Reference) for layer_type in self.types)

    @cached_property
    def linear(self) -> bool:
        """Whether a layer has a recurrent state, instead of rows or in addition."""
        return self.convolves or any(isinstance(layer_type, State) for layer_type in self.types)


@functools.lru_cache(maxsize=64)  # cached properties are then computed once per config
def _layer_types(
    names: tuple[str, ...],
    sizes: tuple[tuple[str, int | None], ...],
    named: bool,
    cut: int | None,
    relative: bool,
) -> LayerTypes:
    types = tuple(LAYER_TYPES[name] for name in names)
    found = {name: int(size) for name, size in sizes if size}
    return LayerTypes(types, found, named, cut, not CONVOLVING.keys().isdisjoint(names), relative)


def _size(config: Any, layer_type: LayerType) -> int | None:
    """The common size of all windows of a type; None: the config gives none."""
    # Configs of Qwen2 have a window size, and a switch that is off.
    if layer_type is SLIDING and getattr(config, "use_sliding_window", True) is False:
        return None
    field = str(layer_type.window_field)
    # Masks are made once per layer type, with one window size.
    found: set[int] = {size for size in compat.layer_values(config, field) if size}
    if len(found) > 1:
        sizes = ", ".join(map(str, sorted(found)))
        raise UnsupportedModelError(
            f"{field} of the layers is {sizes}. Served are decoders whose windows have "
            "one size. Run it without patch()."
        )
    return found.pop() if found else None


def _refuse_types(decoder: Any, types: Sequence[str]) -> None:
    """Refuse unknown layer types, and attention that depends on the number of rows."""
    for name, reason in BY_ROW.items():
        values = [v for v in compat.layer_values(decoder.config, name) if isinstance(v, int)]
        value = max(values, default=0)
        if value <= 1:
            continue
        # The field alone says nothing: only layers of this type choose blocks.
        if name == "index_block_size" and BLOCKS not in types:
            continue
        raise RowIndexedAttentionError(
            f"{type(decoder).__name__}: {reason.format(value)} ({name} of its config), so that "
            "dropping a token would not equal masking it: the rows after it would count "
            "differently. Run it without patch()."
        )
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has {', '.join(unknown)} layers, for "
            "which it is not checked that dropping a token equals masking it. Served are "
            f"{', '.join(sorted(LAYER_TYPES))}. Run it without patch()."
        )
