"""InternVL: tiles by aspect ratio, then a thumbnail, in one run; frames are single tiles."""

from __future__ import annotations

from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.tiles import TileAdapter, shrunk


@register_adapter
class InternVLAdapter(TileAdapter):
    """The class token of the vision tower never reaches the decoder.

    Frames of a video carry the image token, with "Frame1: " and the like between them, so each
    frame is a span of its own.
    """

    family = "InternVL"
    model_types = ("internvl",)

    @property
    def tile_side(self) -> int:
        return shrunk(self.patches_per_side, self.model.config.downsample_ratio)
