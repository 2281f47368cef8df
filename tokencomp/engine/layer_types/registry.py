"""Layer types: what each means for masks, windows and scores; all by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokencomp.engine.cache.rows import REFERENCE, first_layer
from tokencomp.engine.layer_types import mask_compat
from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class LayerType:
    """A layer type; this one attends to all tokens before it.

    A new kind is a subclass and a row in `ROWS`.

    Attributes
    ----------
    name
        As transformers' configs name it, and as decoders find its mask.
    window_field
        Field of the text config with the size of its window, in tokens.
    attends
        Whether it has queries and keys, one row per token, so that its attention can score tokens.
    counts_from_start
        Whether windows are counted from the first real column of every sample.
    skips_masks
        Whether transformers may leave out a mask that hides nothing.
    masks_single_tokens
        Whether the decoder builds a mask for a single token, too.
    cuts_later_turns
        Whether only the first prompt is kept whole, so that later media cannot be served.
    """

    name: str
    window_field: ClassVar[str | None] = None
    attends: ClassVar[bool] = True
    counts_from_start: ClassVar[bool] = False
    skips_masks: ClassVar[bool] = True
    masks_single_tokens: ClassVar[bool] = False
    cuts_later_turns: ClassVar[bool] = False

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether a window of `size` tokens shows a query a key before it; both are columns.

        Without a window it always does. `start` is the first real column of the sample.
        """
        return True

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether the mask that the decoder builds from a 2-D mask of rows would be wrong.

        `source` is the `MaskSource` of the call, and `total` counts the tokens of the uncompressed
        sequence after it.
        """
        return False

    def mask(self, source: Any, segment: Segment, x: Tensor, text: Tensor | None) -> Any:
        """The mask of these layers in a segment.

        `source` is the `MaskSource` of the call, and x (B, n, d) is read for its shape, dtype and
        device. `text` are positions (B, n) that begin again in every prompt of a packed row; there
        is no cache then.
        """
        return source.attention_mask(self, segment, x, text)


class Windowed(LayerType):
    """Layers whose queries see a window, whose size the config gives."""

    def exceeded(self, source: Any, total: int) -> bool:
        """Whether a layer would not see all of a sequence of `total` tokens."""
        size = source.layer_types.sizes.get(self.name)
        return size is not None and total > size


class Sliding(Windowed):
    """Queries see the last `size` columns, their own among them."""

    window_field = "sliding_window"

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether fewer than `size` columns lie between them."""
        return key > query - size

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether a column has left the window of a query: transformers counts rows."""
        if not source.by_column or not self.exceeded(source, total):
            return False
        return segment.gaps_within(source.layer_types.sizes[self.name])


class Chunked(Windowed):
    """Queries see their own chunk of `size` columns, counted from the first real one (Llama 4)."""

    window_field = "attention_chunk_size"
    counts_from_start = True

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether both lie in one chunk."""
        return (key - start) // size == (query - start) // size

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether columns are missing: transformers counts chunks from logical columns."""
        return self.exceeded(source, total) and segment.gaps


class Indexed(LayerType):
    """Queries see the rows that an indexer chooses, which adds its choice to a mask (DeepSeek)."""

    skips_masks = False
    masks_single_tokens = True


class Reference(LayerType):
    """Layers that see all of the first prompt, and a window of what follows (Unlimited-OCR).

    Only that window slides, and no column is missing among its rows. Media of later calls are
    refused, see `tokencomp.engine.call.entry`.
    """

    masks_single_tokens = True
    cuts_later_turns = True

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether rows are padded: transformers looks up padding by shifted columns."""
        return bool(segment.physical) and segment.past is not None

    def mask(self, source: Any, segment: Segment, x: Tensor, text: Tensor | None) -> Any:
        """All rows of the prompt, and a window of the later ones."""
        if not segment.physical:
            return super().mask(source, segment, x, text)
        layer = first_layer(source.layers, segment.first)
        evicted = max(layer.cumulative_length - layer.sliding_window + 1, 0)
        rows = torch.arange(segment.physical + x.shape[1], device=x.device)
        prompt = rows < layer.prefill_length
        rows = rows[prompt | (rows >= layer.prefill_cumulative_length + evicted)]
        new = rows[-x.shape[1] :, None]
        near = (rows > new - layer.sliding_window) | (rows < layer.prefill_length)
        visible = (near & (rows <= new)).expand(x.shape[0], 1, -1, -1)
        valid = segment.all_valid(source.new)
        if valid is not None:
            visible = visible & valid.to(x.device)[:, None, None, rows]
        return mask_compat.backend_mask(source.config, visible, x)


class Mixing(LayerType):
    """No attention: MLPs or experts alone. A token that leaves is not in the sequence at all."""

    attends = False


class State(Mixing):
    """Linear attention or short convolutions: a state of constant size, and a mask of padding."""

    def mask(self, source: Any, segment: Segment, x: Tensor, text: Tensor | None) -> Any:
        """False at padding, (B, n), or None where there is none."""
        return None if source.new is None else source.new.to(x.device)


FULL = LayerType("full_attention")
SLIDING = Sliding("sliding_attention")
CONVOLUTION = State("linear_attention")  # under whose name decoders take the mask of convolutions
ROWS = (
    FULL,
    SLIDING,
    CONVOLUTION,
    Chunked("chunked_attention"),
    Indexed("indexed_attention"),
    Reference(REFERENCE),
    State("conv"),
    Mixing("moe"),
    Mixing("mlp"),
)
# Attention whose keys and values run through short convolutions: what its masks are those of.
CONVOLVING = {"hybrid": FULL, "hybrid_sliding": SLIDING}
LAYER_TYPES: dict[str, LayerType] = {
    **{layer_type.name: layer_type for layer_type in ROWS},
    **CONVOLVING,
}
