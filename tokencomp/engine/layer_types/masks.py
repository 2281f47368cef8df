"""The attention mask of every layer type, for a sequence from which tokens have left.

transformers makes one mask per layer type and knows rows only. Here a sliding or chunked window
is measured in the columns of the uncompressed prompt, as long as the rotary embedding uses them
too. Dropping a token then equals masking it: no other token comes into the window in its place.
Masks that the body of a model has prepared, which let the tokens of an image see each other, are
gathered and never built again.

A window of four columns, seen by the last token, when columns 2, 3 and 5 have left:

    column of the prompt   0  1  2  3  4  5  6  7
    kept                   x  x  .  .  x  .  x  x
    four columns                       x  .  x  x    what this module lets it see: 4, 6, 7
    four rows                 x        x     x  x    what a window of rows would: 1, 4, 6, 7
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.cache.rows import keeps_window
from tokencomp.engine.layer_types import mask_compat
from tokencomp.engine.layer_types.registry import CONVOLUTION, LayerType
from tokencomp.engine.layer_types.types import LayerTypes
from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class MaskSource:
    """What the masks of one decoder call are built from.

    Attributes
    ----------
    config
        Config of the decoder.
    layer_types
        The windows of its layers.
    layers
        Layers of the KV cache; empty where there is none.
    new : Tensor of bool, shape (B, n), or None
        False at padding among the columns of this call.
    prepared
        The mask that the body has prepared for the uncompressed call: one of (B, 1, L, columns), a
        tensor or blocks of FlexAttention, or a mapping from layer types to such masks; None:
        plain causal attention.
    by_column
        Whether windows are measured in columns of the uncompressed sequence, not in rows.
    starts : Tensor of int64, shape (B,), or None
        First real column of every sample, from which chunks are counted.
    """

    config: Any
    layer_types: LayerTypes
    layers: list[Any]
    new: Tensor | None
    prepared: Any
    by_column: bool
    starts: Tensor | None = None

    def explicit(self, segment: Segment, total: int) -> bool:
        """Whether the decoder's own masks, built from a 2-D mask of rows, would be wrong.

        Parameters
        ----------
        total
            Tokens of the uncompressed sequence after this call.
        """
        if self.prepared is not None:
            return True
        return any(
            layer_type.misplaced(self, segment, total) for layer_type in set(self.layer_types.types)
        )

    def decoder_mask(self, segment: Segment, x: Tensor) -> Any:
        """What the decoder takes as `attention_mask`, with the masks of all layer types."""
        types = set(self.layer_types.types[segment.first : segment.stop])
        masks = {
            layer_type.name: layer_type.mask(self, segment, x, None)
            if layer_type in types
            else None
            for layer_type in dict.fromkeys(self.layer_types.types)
        }
        if self.layer_types.convolves:
            masks[CONVOLUTION.name] = CONVOLUTION.mask(self, segment, x, None)
        # Decoders without kinds in their config pass one mask on to all layers.
        if isinstance(self.prepared, Mapping) or (self.prepared is None and self.layer_types.named):
            return masks
        return masks[self.layer_types.types[segment.first].name]

    def attention_mask(
        self, layer_type: LayerType, segment: Segment, x: Tensor, text: Tensor | None
    ) -> Any:
        """What the queries of a segment see: prepared or causal, real, and in their window."""
        held = self._held(layer_type, segment)
        offset = segment.logical - held  # logical column of the first row that is held
        view = mask_compat.MaskView(held, offset)
        new = None if text is not None else self.new
        padding = segment.padding_mask(new, x.shape[0], x.device)
        window = self._window(layer_type, segment, x)
        block = self.prepared
        if isinstance(block, Mapping):
            block = block.get(layer_type.name)
        if block is not None:
            return self._with_block(block, segment, x, padding, window, held, offset)
        return mask_compat.causal_mask(
            self.config, x, padding, view, text, window, layer_type.skips_masks
        )

    def _held(self, layer_type: LayerType, segment: Segment) -> int:
        """Rows of earlier calls that the keys of these layers begin with."""
        if layer_type.name not in self.layer_types.sizes:
            return segment.physical
        pairs = [*zip(self.layers, self.layer_types.types, strict=False)]
        # A segment whose layers have no cache of their own reads that of earlier ones.
        for part in (pairs[segment.first : segment.stop], pairs[: segment.first][::-1], pairs):
            for layer, own in part:
                if own == layer_type and keeps_window(layer):
                    return min(segment.physical, int(layer.sliding_window) - 1)
        return segment.physical

    def _window(
        self, layer_type: LayerType, segment: Segment, x: Tensor
    ) -> Callable[..., Any] | None:
        """Whether a key lies in the window of a query, as a function for transformers' masks."""
        size = self.layer_types.sizes.get(layer_type.name)
        if size is None or segment.logical + segment.span_of_call <= size:
            return None
        columns = segment.columns(x.shape[0], x.device) if self.by_column else None
        starts = self._starts(segment, x)

        def place(sample: Any, index: Any) -> Any:
            row = index - segment.dropped
            return row if columns is None else columns[sample, row]

        def within(sample: Any, head: Any, query: Any, key: Any) -> Any:
            query, key = place(sample, query), place(sample, key)
            return layer_type.visible(query, key, size, starts[sample])

        return within

    def _starts(self, segment: Segment, x: Tensor) -> Tensor:
        """First real column (or row, where rows count) of every sample, int64, (B,)."""
        if self.by_column and self.starts is not None:
            return self.starts.to(x.device)
        valid = None if self.by_column else segment.all_valid(self.new)
        if valid is None:
            return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return (valid.to(x.device).cumsum(1) == 0).sum(1)

    def _with_block(
        self,
        block: Any,
        segment: Segment,
        x: Tensor,
        padding: Tensor | None,
        window: Callable[..., Any] | None,
        held: int,
        offset: int,
    ) -> Any:
        """The prepared mask of the columns of this call, behind the rows of earlier calls."""
        batch, n = x.shape[:2]
        block = mask_compat.visible_columns(block).expand(batch, -1, -1, -1)
        block = block[..., block.shape[-1] - block.shape[-2] :]  # columns of this call alone
        index = segment.layout.origin
        if index is not None:
            index = index.to(block.device)
            rows = index[:, None, :, None].expand(-1, block.shape[1], -1, block.shape[-1])
            block = block.gather(2, rows)
            keys = index[:, None, None, :].expand(-1, block.shape[1], n, -1)
            block = block.gather(3, keys)
        if held:
            past = torch.ones(batch, block.shape[1], n, held, dtype=torch.bool, device=x.device)
            if window is not None:
                device = x.device
                past &= window(
                    torch.arange(batch, device=device)[:, None, None, None],
                    0,
                    torch.arange(n, device=device)[None, None, :, None] + segment.logical,
                    torch.arange(held, device=device) + offset,
                )
            block = torch.cat([past, block.to(x.device)], dim=-1)
        if padding is not None:
            block = block & padding[:, None, None, -block.shape[-1] :]
        return mask_compat.backend_mask(self.config, block, x)
