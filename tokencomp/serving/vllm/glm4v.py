"""GLM-4.1V, 4.5V and 4.6V for vLLM, whose videos are frames with text between them.

Every frame is a span, so that the number of kept tokens of each frame is known before
the vision tower runs. The text between the frames stays where it is and has exact positions from
the start; rows carry their offsets within their frame.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.serving.item_plan import ItemPlan, field_name, item_span
from tokencomp.serving.offsets import grid_offsets
from tokencomp.serving.vllm import mrope
from tokencomp.tokens.tokens import VisualSpan


class Glm4vProcessor(mrope.MRopeProcessor):
    """Frames as spans."""

    no_tower_stage = "which patches of its vision tower a visual token reads has not been checked"

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[VisualSpan]]:
        whole = super().layouts(modality, items, hf_inputs)
        grids = [video[0].grid for video in whole]
        return [[item_span(modality, (1, h, w))] * t for t, h, w in grids]

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        """t · max(h, w) per item; text between frames adds its own positions."""
        return [len(spans) * max(spans[0].grid) for spans in layouts]


class Glm4vModel(mrope.MRopeModel):
    """Positions of frames with text between them, for the dense and the MoE variants."""

    def kept_offsets(self, plan: ItemPlan, index: Tensor, *item: Any) -> Tensor:
        """The offsets of kept patches within their frame."""
        frame = plan.spans[0]
        return torch.from_numpy(grid_offsets(frame.grid, 1.0))[:, index % frame.length]

    def item_offsets(self, feature: Any) -> tuple[np.ndarray, int]:
        """Offsets and extent; rows of a compressed item are at the base of their frame."""
        modality, place = feature.modality, feature.mm_position
        merge = self.config.vision_config.spatial_merge_size
        t, h, w = feature.data[f"{modality}_grid_thw"].data.tolist()
        frame, side = grid_offsets((1, h // merge, w // merge), 1.0), max(h, w) // merge
        counts, inside = [frame.shape[1]] * t, np.tile(frame, t)
        if field_name(modality) in feature.data:
            plan = ItemPlan.from_tensor(feature.data[field_name(modality)].data)
            if plan.kept < plan.full:
                counts, inside = list(plan.keep), np.zeros((3, plan.kept), dtype=np.int64)
        media = np.ones(place.length, dtype=bool)
        if place.is_embed is not None:
            media = place.is_embed.numpy()
        if int(media.sum()) != inside.shape[1]:
            raise RuntimeError(f"{media.sum()} placeholders for {inside.shape[1]} planned tokens")
        done = np.cumsum(media) - media  # number of rows before every token
        frames = np.searchsorted(np.cumsum(counts), done, side="right")
        offsets = np.tile(np.arange(place.length) - done + frames * side, (3, 1))
        offsets[:, media] += inside
        return offsets, place.length - len(inside[0]) + t * side


MIXINS = {"Model": Glm4vModel, "Processor": Glm4vProcessor}
