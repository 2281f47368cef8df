"""Qwen2-VL and Qwen2.5-VL: three-row rotary positions, one run per image or video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter, Call, register_adapter
from tokencomp.engine import compat
from tokencomp.errors import SpanError
from tokencomp.tokens import VisualSpan

if TYPE_CHECKING:
    from tokencomp.engine.tower import TowerCall


@register_adapter
class Qwen2VLAdapter(Adapter):
    """Grids are read back from the M-RoPE positions, which every version hands to the decoder."""

    family = "Qwen2-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    mrope = True
    signals = (*Adapter.signals, "tower")
    _video_checked = False

    @classmethod
    def of(cls, model: nn.Module) -> Adapter:
        compat.check_rope_index(model, "image")
        return cls(model)

    @property
    def tower(self) -> Any:
        return self.body.visual

    def tower_tokens(self, values: Tensor, kind: str, call: TowerCall) -> Tensor:
        unit = self.model.config.vision_config.spatial_merge_size**2
        return values[0].unflatten(0, (-1, unit)).mean(1)

    def row_spans(self, call: Call, row: int) -> list[VisualSpan]:
        if call.positions is None:
            raise SpanError(
                "the decoder got no M-RoPE positions for a prompt with visual tokens. Pass "
                "input_ids (and mm_token_type_ids) as the processor returns them."
            )
        spans = []
        for start, stop, kind in call.runs(row):
            if kind == "video":
                self.check_video()
            _, h, w = call.positions[:, row, start:stop]
            rows, cols = int(h.max() - h.min()) + 1, int(w.max() - w.min()) + 1
            n = stop - start
            raster = torch.arange(n)
            regular = n % (rows * cols) == 0 and (
                torch.equal(h - h[0], raster // cols % rows)
                and torch.equal(w - w[0], raster % cols)
            )
            if not regular:
                raise SpanError(
                    f"visual tokens {start} … {stop - 1} of sample {row} do not form one t×h×w "
                    "grid. Expected whole images or videos, each between its own start and end "
                    "tokens, with the positions the model computes."
                )
            spans.append(VisualSpan(start, n, (n // (rows * cols), rows, cols), kind))
        return spans

    def check_video(self) -> None:
        """Raise `UnsupportedModelError` if the release gets positions of videos wrong."""
        if not self._video_checked:  # the answer stays the same as long as the model
            compat.check_rope_index(self.model, "video")
            self._video_checked = True


@register_adapter
class Qwen25VLAdapter(Qwen2VLAdapter):
    """Temporal positions are scaled by seconds; the tower's window order ends at its merger."""

    family = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)

    def tower_tokens(self, values: Tensor, kind: str, call: TowerCall) -> Tensor:
        order = compat.window_order(self.tower, call.grids).to(values.device)
        return super().tower_tokens(values, kind, call)[order.argsort()]
