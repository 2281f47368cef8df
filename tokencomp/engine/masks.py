"""Attention masks of every segment and layer type after dropping.

transformers builds one mask per layer type and counts rows. Here sliding and chunked windows are
measured in columns, like the rotary embedding (with `positions="compact"` in rows): `Masks._window`
looks up the column of every row, and `LayerType.visible` compares those of query and key. Dropping
a token then equals masking it: no other token enters the window in its place. A window of four
columns, seen by the last token, when columns 2, 3 and 5 were dropped:

    column of the prompt   0  1  2  3  4  5  6  7
    kept                   x  x  .  .  x  .  x  x
    four columns                       x  .  x  x    visible here: 4, 6, 7
    four rows                 x        x     x  x    in a window of rows: 1, 4, 6, 7

Who builds a mask:

    segment 0   the decoder, from the 2-D mask of `Masks.decoder_mask`; or, where the decoder's mask
                would be wrong for a layer type (`LayerType.needs_own_mask`), the body has made
                masks of uncompressed columns, or masks add the weights of merged rows,
                `Masks.decoder_mask` itself: one mask per layer type, which the decoder passes on
    others      `Masks.of`, when the first layer of a type is entered; `LayerHooks._layer`
                (`layers.py`) passes it in place of the decoder's

This holds for prompts and for later turns (`later.py` lists those without a mask). Of the caller's
mask a later turn reads only the columns of the turn: the cache layers store which of their rows are
real. A chunked prefill (`ChunkedPrefill`) passes the first entries of the 2-D mask to each of its
passes; where we build one mask per layer type, a prompt is not chunked.

Masks that the body has prepared, in which tokens of an image attend to each other, are gathered by
column and never rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

from tokencomp.engine.cache import physical_length
from tokencomp.engine.call import Call, Segment
from tokencomp.engine.layer_types import CONVOLUTION, FULL, LAYER_TYPES, LayerType
from tokencomp.engine.rowmap import joined_mask
from tokencomp.errors import UnsupportedCacheError
from tokencomp.torchlib.compat import attention_implementation
from tokencomp.torchlib.masks import (
    MaskView,
    StaticMaskView,
    backend_mask,
    causal_mask,
    check_flash_on_static,
    only_padding,
    visible_columns,
    weighted_mask,
)


@dataclass(frozen=True)
class Masks:
    """The masks of one decoder call.

    `Call.prepared` is what the body prepared for the uncompressed call: (B, 1, L, columns), as a
    tensor or block mask of FlexAttention, or a mapping from layer types to such masks; None: plain
    causal attention. `real` (B, n) is False at padding among the rows of segment 0; None: all are
    real, or packed prompts separate it. Other segments read the map of their rows.
    """

    call: Call
    real: Tensor | None = None

    # -- segment 0 ------------------------------------------------------------------------------

    def decoder_mask(self, x: Tensor) -> Any:
        """The `attention_mask` of the decoder; x (B, n, d) are the rows of segment 0.

        The 2-D mask, bool (B, entries) or None, from which the decoder makes its masks, see
        `_padding`. FlashAttention takes no other mask, and reads all rows of a static cache,
        written or not: it needs one by row, (B, rows), also if all rows are real. Where the
        decoder's masks would be wrong: masks by layer type, or one for all.
        """
        types, first = self.call.layer_types, self.call.segments[0]
        wrong = self.call.prepared is not None or self._adds_weights(first)
        # Which layer types have an exceeded window, whose mask transformers would count in rows.
        if not wrong and not types.all_full:
            length = self.call.length_after()
            past_window = {t: length > types.sizes.get(t.name, length) for t in types.types}
            wrong = any(t.needs_own_mask(self, first, past) for t, past in past_window.items())
        if wrong:
            return self._by_type(x)
        padding, static = self._padding(first, x), isinstance(self.call.first_layer, StaticLayer)
        if not static or "flash" not in attention_implementation(self.call.adapter.text_config):
            return padding
        check_flash_on_static()
        if padding is None:
            rows = first.past.rows + x.shape[1]
            return torch.ones(x.shape[0], rows, dtype=torch.bool, device=x.device)
        return padding[:, first.past.dropped :]

    def _by_type(self, x: Tensor) -> Any:
        """One mask per layer type of segment 0, in the form that the decoder takes."""
        first, types = self.call.segments[0], self.call.layer_types
        present = set(types.types[first.first : first.stop])
        masks = {
            t.name: self.of(t, first, x, None) if t in present else None
            for t in dict.fromkeys(types.types)
        }
        if types.convolves:
            masks[CONVOLUTION.name] = CONVOLUTION.mask(self, first, x, None)
        # Decoders without layer types in the config pass one mask to all layers.
        prepared = self.call.prepared
        if isinstance(prepared, Mapping) or (prepared is None and types.named):
            return masks
        return masks[types.types[first.first].name]

    # -- every segment --------------------------------------------------------------------------

    def of(self, layer_type: LayerType, segment: Segment, x: Tensor, text: Tensor | None) -> Any:
        """The mask of a layer type in a segment, as `LayerType.mask` makes it.

        With `Call.numbers` it also adds log(weight) to the logits of merged rows.
        """
        mask, numbers = layer_type.mask(self, segment, x, text), self.call.numbers
        if numbers is None or not layer_type.attends or not segment.weighted:
            return mask
        keys = segment.past.rows + x.shape[1] if mask is None else mask.shape[-1]
        weights = self.call.key_weights(segment, layer_type, keys, x.shape[0], x.device)
        return weighted_mask(mask, weights.log().to(numbers)[:, None, None])

    def _adds_weights(self, segment: Segment) -> bool:
        return self.call.numbers is not None and segment.weighted

    def attention_mask(
        self, layer_type: LayerType, segment: Segment, x: Tensor, text: Tensor | None
    ) -> Any:
        """Mask of a segment, causal or prepared, which hides padding rows and respects windows."""
        size = self.call.layer_types.sizes.get(layer_type.name)
        held, window = segment.past.rows, None
        padding = self._padding(segment, x, separated=text is not None)
        if size is not None:
            held = self._held(layer_type, segment)
            window = self._window(layer_type, segment, x, size, padding)
        # Entry of the first row that these layers hold: rows that slid out are before it.
        offset = segment.past.dropped + segment.past.rows - held
        block = self.call.prepared
        if isinstance(block, Mapping):
            block = block.get(layer_type.name)
        if block is not None:
            return self._with_block(block, segment, x, padding, window, held)
        view, skips = MaskView(held, offset), layer_type.skips_masks
        if self._adds_weights(segment):  # numbers for all keys, also for memory of later rows
            skips, static = False, getattr(self.call.first_layer, "max_cache_len", None)
            if static is not None:
                view = StaticMaskView(static, offset, written=held + offset)
        return causal_mask(self.call.adapter.text_config, x, padding, view, text, window, skips)

    def _padding(self, segment: Segment, x: Tensor, separated: bool = False) -> Tensor | None:
        """The 2-D mask, bool (B, `past.dropped` + rows), False at padding rows; None without any.

        transformers reads row i at entry `past.dropped` + i, and never the entries before: see the
        drawing in `tokencomp.engine`. `separated`: the padding of this call is one more packed
        prompt, which positions separate from the others, and needs no mask.
        """
        real = self.real if segment.first == 0 else segment.new.mask(x.device)
        real = None if separated else real
        real = joined_mask(segment.past, real, segment.new.rows, x.device)
        if real is None:
            return None
        ones = torch.ones(x.shape[0], segment.past.dropped, dtype=torch.bool, device=x.device)
        return torch.cat([ones, real.to(x.device)], dim=1)

    def _held(self, layer_type: LayerType, segment: Segment) -> int:
        """Number of cached rows that precede the keys of this call in layers with a window."""
        rows, layers = segment.past.rows, getattr(self.call.cache, "layers", None) or ()
        pairs = [*zip(layers, self.call.layer_types.types, strict=False)]
        # If the layers of the segment cache nothing, they reuse keys of earlier layers.
        for layer, its_type in reversed(pairs[: segment.stop]):
            if its_type == layer_type and isinstance(layer, DynamicSlidingWindowLayer):
                return min(rows, int(layer.sliding_window) - 1)
        return rows

    def _window(
        self,
        layer_type: LayerType,
        segment: Segment,
        x: Tensor,
        size: int,
        padding: Tensor | None,
    ) -> Callable[..., Any] | None:
        """Whether a key is in the window of a query, as a function for transformers' masks.

        It calls the function with entries of the 2-D mask, whose `padding` is given. None: every
        query sees all keys.
        """
        past = segment.past
        # The whole sequence fits into the window.
        if past.length + self.call.width <= size:
            return None
        # Column of every row, and first real column of every sample; with compact positions rows.
        columns = starts = None
        if self.call.by_column:
            columns, starts = segment.columns(x.shape[0], x.device), self.call.first_columns()
        elif padding is not None:
            starts = (padding[:, past.dropped :].cumsum(1) == 0).sum(1)
        starts = torch.zeros(x.shape[0], dtype=torch.long) if starts is None else starts
        starts = starts.to(x.device)

        def column(sample: Any, entry: Any) -> Any:
            row = entry - past.dropped
            return row if columns is None else columns[sample, row]

        def within(sample: Any, head: Any, query: Any, key: Any) -> Any:
            query, key = column(sample, query), column(sample, key)
            return layer_type.visible(query, key, size, starts[sample])

        return within

    def _with_block(
        self,
        block: Any,
        segment: Segment,
        x: Tensor,
        padding: Tensor | None,
        window: Callable[..., Any] | None,
        held: int,
    ) -> Any:
        """The prepared mask of the columns of this call, after the rows of earlier calls."""
        (batch, n), past = x.shape[:2], segment.past
        block = visible_columns(block).expand(batch, -1, -1, -1)
        block = block[..., block.shape[-1] - block.shape[-2] :]  # columns of this call only
        # Queries and keys of the kept columns.
        index = segment.new.columns
        if index is not None:
            index = index.to(block.device)
            rows = index[:, None, :, None].expand(-1, block.shape[1], -1, block.shape[-1])
            block = block.gather(2, rows)
            keys = index[:, None, None, :].expand(-1, block.shape[1], n, -1)
            block = block.gather(3, keys)
        # Cached rows come first, visible if they are in the window. The first query is at entry
        # `past.length`: `dropped` + the number of cached rows.
        if held:
            before = torch.ones(batch, block.shape[1], n, held, dtype=torch.bool, device=x.device)
            if window is not None:
                device = x.device
                before &= window(
                    torch.arange(batch, device=device)[:, None, None, None],
                    0,
                    torch.arange(n, device=device)[None, None, :, None] + past.length,
                    torch.arange(held, device=device) + past.length - held,
                )
            block = torch.cat([before, block.to(x.device)], dim=-1)
        if padding is not None:
            block = block & padding[:, None, None, -block.shape[-1] :]
        return backend_mask(self.call.adapter.text_config, block, x)


# -- masks that were prepared before the decoder was called -------------------------------------
# For static caches `generate` prepares masks before the model runs, by column of the uncompressed
# prompt. For a compressed prompt their padding is recovered, and the masks are rebuilt.


def read_mask(
    arguments: Mapping[str, Any], layer: Any, body_mask: Any
) -> tuple[Tensor | None, Any]:
    """The 2-D mask of a decoder call (B, past + queries), and the mask that the body prepared.

    The 2-D mask is None if all columns are real. The other is (B, heads, L, columns), or a mapping
    from layer types to such masks; None, also for a layer type, is plain causal attention, the only
    kind that FlashAttention supports. `layer` is the first cache layer with rows, or None. If
    `body_mask`, that of the body, has more than two axes or is a mapping, the caller has prepared
    it, and `padding_of` reads the mask of the decoder.
    """
    mask = arguments.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask, None
    # A mask that the caller gave as 2-D and the body has expanded lets image tokens see each other;
    # one that the caller prepared (static caches) hides padding only.
    by_body = isinstance(mask, Mapping) or _dense(mask)
    if not by_body or isinstance(body_mask, Mapping) or getattr(body_mask, "ndim", 2) != 2:
        queries = arguments["inputs_embeds"].shape[1]
        return padding_of(mask, queries, physical_length(layer)), None
    masks = mask if isinstance(mask, Mapping) else {"": mask}
    dense = {name: one if _dense(one) else None for name, one in masks.items()}
    if all(one is None for one in dense.values()):
        return body_mask, None
    if isinstance(layer, StaticLayer):
        raise UnsupportedCacheError(
            "the model lets tokens of an image see each other, and prepares its masks for a "
            "static cache by column of the uncompressed prompt. Drop cache_implementation=..., or "
            "turn compression off with handle.disabled()."
        )
    return body_mask, dense if masks is mask else mask


def _dense(mask: Any) -> bool:
    """Whether a mask has an entry per query."""
    return isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.ndim == 4)


def padding_of(mask: Any, queries: int, past: int) -> Tensor | None:
    """Recover the 2-D mask (B, past + queries), bool, from a prepared `mask`.

    The mask is bool or additive, (B, 1, queries, columns), a 2-D one, or None for all columns; or a
    mapping from layer types to those. `past` rows precede the `queries` of the call. Raises
    `UnsupportedCacheError` if the mask hides more than padding and future tokens.
    """
    if isinstance(mask, Mapping):
        attention = {
            k: m for k, m in mask.items() if k not in LAYER_TYPES or LAYER_TYPES[k].attends
        }
        if set(attention) != {FULL.name}:
            raise _refusal(f"a mask for each of {', '.join(sorted(mask))}")
        mask = mask[FULL.name]
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != queries:
        shape = tuple(mask.shape) if hasattr(mask, "shape") else mask
        raise _refusal(f"a {type(mask).__name__} of shape {shape}")
    visible = visible_columns(mask)
    if visible.shape[-1] < past + queries:
        columns = visible.shape[-1]
        raise _refusal(f"a mask of {columns} columns for {past + queries} tokens (a short cache)")
    padding = visible[:, 0, -1, : past + queries]  # the last query attends to all real columns
    if not only_padding(visible, padding, past):
        raise _refusal("a 4-D mask that hides other columns than padding on the left")
    return padding


def _refusal(description: str) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"attention_mask is {description}, prepared before the decoder was called. A "
        "compressed prompt needs the 2-D mask of padding, or one that transformers prepared from "
        "it for a static cache with sdpa or eager attention. Pass the 2-D attention_mask "
        "of the processor."
    )
