"""Qwen2.5-VL for vLLM, whose frames have distances in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencomp.serving.offsets import grid_extent
from tokencomp.serving.vllm import mrope


def time_factor(vision_config: Any, inputs: Mapping[str, Any], item: int) -> float:
    """Return the positions between two frames of a video; `inputs` are the processor's outputs."""
    per_second = getattr(vision_config, "tokens_per_second", 1.0)
    seconds = inputs.get("second_per_grid_ts")
    return per_second * (1.0 if seconds is None else float(seconds[item]))


class Processor(mrope.Processor):
    """Extents of videos in time."""

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        """See `CompressingProcessor.extents`."""
        if modality == "image":
            return super().extents(modality, layouts, hf_inputs)
        # Only videos have times between their frames.
        config = self.info.get_hf_config().vision_config  # type: ignore[attr-defined]  # of vLLM's class
        return [
            grid_extent(spans[0].grid, time_factor(config, hf_inputs, i))
            for i, spans in enumerate(layouts)
        ]


class Model(mrope.Model):
    """Positions of frames in time."""

    config: Any

    def t_factor(self, kwargs: Mapping[str, Any], item: int) -> float:
        """See `mrope.Model.t_factor`."""
        return time_factor(self.config.vision_config, kwargs, item)
