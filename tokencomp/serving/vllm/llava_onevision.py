"""LLaVA-OneVision for vLLM, whose tokens the engine renumbers without gaps."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava_onevision import get_anyres_image_grid_shape

from tokencomp.serving.item_plan import item_span
from tokencomp.serving.vllm.model import CompressingModel
from tokencomp.serving.vllm.processing import DENSE_TOWER, CompressingProcessor
from tokencomp.tokens.tokens import VisualSpan


class LlavaOnevisionProcessor(CompressingProcessor):
    """An image: base tile, and mosaic with line breaks; a video: a grid, and one at its end."""

    no_tower_stage = DENSE_TOWER

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[VisualSpan]]:
        if modality == "image":
            return [self._image(items.get_image_size(i)) for i in range(len(items))]
        return [
            self._video(items.get_frame_size(i), items.get_num_frames(i)) for i in range(len(items))
        ]

    def _image(self, size: Any) -> list[VisualSpan]:
        """Base tile and mosaic, whose grid follows from vLLM's counts."""
        encoder = self.info.get_vision_encoder_info()
        side = encoder.get_patch_grid_length()
        rows, columns = get_anyres_image_grid_shape(
            image_size=(size.height, size.width),
            grid_pinpoints=self.info.get_hf_config().image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        patches, breaks = self.info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=side,
            num_patch_height=rows,
            num_patch_width=columns,
        )
        width = patches // breaks
        line_breaks = range(width, patches + breaks, width + 1)
        return [
            item_span("image", (1, side, side)),
            item_span("image", (1, breaks, width), line_breaks),
        ]

    def _video(self, size: Any, frames: int) -> list[VisualSpan]:
        per_frame = self.info._get_num_frame_tokens(
            image_width=size.width, image_height=size.height
        )
        side = round(per_frame**0.5)  # frames are square
        return [item_span("video", (frames, side, side), [frames * side * side])]


MIXINS = {"Model": CompressingModel, "Processor": LlavaOnevisionProcessor}
