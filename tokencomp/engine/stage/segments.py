"""Segments of decoder layers: the layers of a segment see the same rows, others see fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.cache.layers import CompressedLayer
from tokencomp.engine.cache.rows import first_layer, flash_on_static, physical_length
from tokencomp.engine.layer_types import mask_compat
from tokencomp.engine.rows.layout import RowLayout
from tokencomp.engine.rows.outputs import cached_columns
from tokencomp.errors import UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage


@dataclass
class Segment:
    """Layers `first … stop - 1`: they see the same rows, of this call and of earlier ones.

    Attributes
    ----------
    physical, dropped : int
        Rows that their cache layers hold at the start of the call, and tokens that left before.
    past, past_columns : Tensor or None
        `valid` and `columns` of those cache layers, see `CompressedLayer`. For plain
        layers, `past` is the caller's mask of padding.
    layout
        Where the tokens of this call stand in these layers.
    stage
        The stage before layer `first`, or None.
    starts : Tensor of int64, shape (B,), or None
        `starts` of those cache layers.
    span_of_call : int
        Columns of this call in the caller's batch.
    index : Tensor of int64, shape (B, n), or None
        Column of the decoder call that each column of `layout` was; None: the same.
    masks, tables
        What the layers of each kind take as `attention_mask`, and their rotary tables. Empty in the
        first segment, for which the decoder itself prepares them.
    text_positions, lengths
        What they take as `position_ids`, and as lengths of packed prompts (`cu_seq_lens_*`).
    ready
        Whether layer `first` has been entered.
    """

    first: int
    stop: int
    physical: int = 0
    dropped: int = 0
    past: Tensor | None = None
    past_columns: Tensor | None = None
    layout: RowLayout = field(default_factory=lambda: RowLayout(0, [], []))
    stage: Stage | None = None
    starts: Tensor | None = None
    span_of_call: int = 0
    index: Tensor | None = None
    masks: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    text_positions: Tensor | None = None
    lengths: dict[str, Any] = field(default_factory=dict)
    ready: bool = False

    @classmethod
    def after(cls, layer: CompressedLayer, first: int, stop: int, layout: RowLayout) -> Segment:
        """The segment of a call on cache layers like `layer`, before any stage of the call."""
        past = (layer.rows, layer.dropped, layer.valid, layer.columns)
        width = layout.width
        return cls(first, stop, *past, layout, starts=layer.starts, span_of_call=width)

    @property
    def logical(self) -> int:
        """Tokens before this call, dropped ones and padding included."""
        return self.physical + self.dropped

    def contiguous(self, new: Tensor | None, x: Tensor) -> Tensor:
        """Positions (B, n) that count real rows only, earlier ones first; x is (B, n, d)."""
        if new is None:
            new = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        counts = new.long().cumsum(1) - 1
        earlier = self.past
        counts += self.physical if earlier is None else earlier.to(x.device).sum(1, keepdim=True)
        return counts.clamp(min=0)

    def all_valid(self, new: Tensor | None) -> Tensor | None:
        """Real rows among past and new ones, (B, rows); None if all are."""
        past = self.past
        if new is None:
            if past is None:
                return None
            new = past.new_ones(len(past), self.layout.width)
        elif past is None:
            past = new.new_ones(len(new), self.physical)
        return torch.cat([past.to(new.device), new], dim=1)

    def all_sizes(self) -> Tensor | None:
        """Tokens that the first rows, past and new, stand for, (B, m); None if one each."""
        new = self.layout.sizes
        if new is None or self.physical == 0:
            return new
        return torch.cat([new.new_ones(new.shape[0], self.physical), new], dim=1)

    @property
    def gaps(self) -> bool:
        """Whether a sample may have lost a token, now or before.

        `dropped` does not tell: it is what the whole batch is narrower by, and 0 where the longest
        sample has lost nothing.
        """
        return self.layout.origin is not None or self.past_columns is not None

    def padding_mask(self, new: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """The 2-D mask by logical column, as transformers counts: dropped columns are real."""
        valid = self.all_valid(new)
        if valid is None:
            return None
        ones = torch.ones(batch, self.dropped, dtype=torch.bool, device=device)
        return torch.cat([ones, valid.to(device)], dim=1)

    def call_mask(self, config: Any, layer: Any, new: Tensor | None, x: Tensor) -> Tensor | None:
        """The 2-D mask of a call, of which the decoder makes that of its layers.

        That of padding; by row, and also where there is none, for FlashAttention on static caches.

        Parameters
        ----------
        layer
            The first layer of the KV cache that holds rows, or None.
        new : Tensor of bool, shape (B, n), or None
            False at padding among the columns of this call.
        x : Tensor, shape (B, n, d)
            Read for its shape and device.
        """
        if not flash_on_static(config, layer):
            return self.padding_mask(new, x.shape[0], x.device)
        mask_compat.check_flash_on_static()
        valid, rows = self.all_valid(new), self.physical + self.layout.width
        if valid is None:
            return torch.ones(x.shape[0], rows, dtype=torch.bool, device=x.device)
        return valid.to(x.device)

    def columns(self, batch: int, device: torch.device) -> Tensor | None:
        """Column of every row, cached before or new, in the uncompressed sequence, (B, rows).

        Columns count over all calls: those of this call follow the logical length before it. None
        while no row has left, so that a row and its column have the same number.
        """
        new = self.layout.origin
        if new is None and self.past_columns is None:
            return None
        if new is None:  # nothing has left in this call, but in an earlier one
            new = torch.arange(self.layout.width, device=device).expand(batch, -1)
        new = new.to(device)
        if not self.physical:
            return new + self.logical if self.logical else new
        past = cached_columns(self.past_columns, self.physical, self.dropped, batch, device)
        return torch.cat([past, new + self.logical], dim=1)

    def gaps_within(self, window: int) -> bool:
        """Whether a column may be missing among the last `window` rows of any query."""
        if self.layout.origin is not None or self.past_columns is None:
            return self.gaps
        return self.physical - self.past_columns.shape[1] < window - 1


def build_segments(
    plan: Plan, total: int, layers: Sequence[Any], mask: Tensor | None, width: int
) -> list[Segment]:
    """Cut the decoder of `total` layers where a stage acts now or has acted in an earlier turn.

    `layers` are those of the KV cache. The call has `width` columns in the caller's batch, and
    `mask` (B, past + L) is that of padding.
    """
    stages = {s.layer: s for s in plan.stages}
    old = {i for i, layer in enumerate(layers) if getattr(layer, "starts_segment", False)}
    starts = sorted({0, *stages, *old})
    segments = []
    for first, stop in zip(starts, [*starts[1:], total], strict=True):
        # Where only linear layers see some rows, the layers behind them tell how many.
        layer, layout = first_layer(layers, first), RowLayout(width, [], [])
        if isinstance(layer, CompressedLayer):
            segment = Segment.after(layer, first, stop, layout)
        else:
            segment = Segment(first, stop, layout=layout, span_of_call=width)
            segment.physical = 0 if layer is None else physical_length(layer)
            if mask is not None and segment.physical:
                past = mask[:, : segment.physical].bool()
                segment.past = None if bool(past.all()) else past
        segment.stage = stages.get(first)
        segments.append(segment)
    return segments


def check_entered(segments: list[Segment], decoder: Any) -> None:
    """Refuse the output of a call whose layers have run without the hooks that they need.

    Tokens have not left then, or layers had the mask of other rows.
    """
    last = getattr(decoder.config, "num_hidden_layers", len(decoder.layers))
    late = [s.first for s in segments if not s.ready and 0 < s.first < last]
    if late:
        raise UnsupportedModelError(
            f"the layers {late} of {type(decoder).__name__} have run without the hooks that drop "
            "tokens before them. The usual reason is that torch.compile runs what it has compiled "
            "before the hooks were there. Call torch.compiler.reset() and run the prompt again, or "
            "compile the model itself in place of its layers."
        )
