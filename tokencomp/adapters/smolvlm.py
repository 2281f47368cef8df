"""SmolVLM and Idefics3: pixel-shuffled tiles between row and column tokens."""

from __future__ import annotations

from typing import Any

from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.tiles import TileAdapter, shrunk


@register_adapter
class SmolVLMAdapter(TileAdapter):
    """The decoder is called `text_model`; frames of a video are single tiles with timestamps."""

    family = "SmolVLM"
    model_types = ("smolvlm", "idefics3")

    @property
    def tower(self) -> Any:
        return self.body.vision_model

    @property
    def projector(self) -> Any:
        return self.body.connector

    @property
    def tile_side(self) -> int:
        return shrunk(self.patches_per_side, 1 / self.model.config.scale_factor)
