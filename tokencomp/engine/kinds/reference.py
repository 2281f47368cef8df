"""Layers that see all of the first prompt, and a window of what follows (Unlimited-OCR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokencomp.engine.cache.rows import first_with_rows
from tokencomp.engine.kinds import mask_compat
from tokencomp.engine.kinds.base import LayerKind

if TYPE_CHECKING:
    from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class Reference(LayerKind):
    """Only the window of later rows slides, and no column is missing among those.

    Media of later calls are refused, see `tokencomp.engine.call.entry`.
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
        layer = first_with_rows(source.layers, segment.first)
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
