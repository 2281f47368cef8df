"""Tiny VILA: SigLIP tower, 2×2 space-to-depth projector, Qwen2 decoder; one square per picture.

Tower and decoder are those of the tiny LLaVA-OneVision at another picture size, so it can start
from them; the projector is the only new part.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from recipes.tiny.families.parts import (
    HALF,
    Encode,
    Family,
    chatml,
    decoder,
    preprocessing,
    siglip,
    start_wide,
)
from recipes.tiny.tokenizer import SPECIAL_TOKENS

SIDE, PATCH, PROJECTOR = 256, 16, "mlp_downsample_2x2_fix"
CELL = 2 * PATCH
GRID = SIDE // CELL
FRAMES = 16  # taken from a video at most
IMAGE, VIDEO = "<image>", "<vila/video>"


class TinyVila(Family):
    """See :class:`~recipes.tiny.families.Family`."""

    chat_template = chatml(IMAGE, VIDEO)
    special_tokens = tuple(VIDEO if token == "<video>" else token for token in SPECIAL_TOKENS)
    text_folder = "llm"
    cell = CELL * 224 // SIDE  # in a picture of 224 px, before it is resized
    card: ClassVar[dict[str, str]] = {
        "layout": "published VILA folder layout",
        "imports": "from tokencomp.models import VilaForConditionalGeneration, VilaProcessor",
        "model_class": "VilaForConditionalGeneration",
        "processor_class": "VilaProcessor",
    }

    def config(self, tokenizer) -> dict[str, Any]:
        return {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "model_dtype": "torch.float16",
            "hidden_size": decoder(tokenizer)["hidden_size"],
            "mm_hidden_size": siglip(SIDE, PATCH)["hidden_size"],
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "cls_patch",
            "image_aspect_ratio": "resize",
            "num_video_frames": FRAMES,
        }

    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        """Configuration files of the folder and of its three sub-checkpoints."""
        text = {"model_type": "qwen2", **decoder(tokenizer)}
        vision = siglip(SIDE, PATCH)
        pixels = preprocessing({"height": SIDE, "width": SIDE}, HALF, HALF)
        half = {"torch_dtype": "float16"}
        return {
            "config.json": self.config(tokenizer),
            "llm/config.json": {"architectures": ["Qwen2ForCausalLM"], **half, **text},
            "vision_tower/config.json": {"architectures": ["SiglipVisionModel"], **half, **vision},
            "vision_tower/preprocessor_config.json": {
                "image_processor_type": "SiglipImageProcessor",
                **pixels,
            },
            "mm_projector/config.json": {
                "model_type": "v2l_projector",
                "mm_projector_type": PROJECTOR,
            },
        }

    def build(self, tokenizer) -> torch.nn.Module:
        from transformers import Qwen2Config, SiglipVisionConfig

        from tokencomp.models import VilaConfig, VilaForConditionalGeneration

        text = Qwen2Config(**decoder(tokenizer))
        vision = SiglipVisionConfig(**_without_type(siglip(SIDE, PATCH)))
        start_wide(text, vision)
        line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
        config = VilaConfig(
            text_config=text,
            vision_config=vision,
            projector_type=PROJECTOR,
            select_layer=-1,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
            image_ends=([], line_end),
            video_ends=([], line_end),
            num_video_frames=FRAMES,
        )
        return VilaForConditionalGeneration(config)

    def weight_name(self, name: str) -> str:
        """Sub-checkpoint and the name in it: "llm/model.norm.weight"."""
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            rest = "vision_model." + rest.removeprefix("vision_model.")
        return f"{part}/{rest}"

    def tokens_per(self, kind: str, shape: tuple[int, int, int]) -> int:
        """The square of every frame, and its line end."""
        return shape[0] * (GRID * GRID + 1)

    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        *before, line_end, placeholder = ids  # the user turn starts with a line end, then media
        frame = [placeholder] * (GRID * GRID) + [line_end]
        full = np.array([*before, line_end, *frame * shape[0]], np.int64)
        return full, np.arange(len(full))[None]

    def pixels(self, frames: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        planes = _planes(frames)
        if kind == "image":
            return {"pixel_values": planes}
        counts = torch.full((len(frames),), frames.shape[1])
        return {"pixel_values_videos": planes, "video_frames": counts}

    def hidden(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        media = ("input_ids", "pixel_values", "pixel_values_videos", "video_frames")
        embeds = model.embed(**{name: inputs[name] for name in media if name in inputs})
        rest = {name: value for name, value in inputs.items() if name not in media}
        return model.llm.model(inputs_embeds=embeds, use_cache=False, **rest).last_hidden_state

    def tokens(self, model, frames: torch.Tensor, kind: str) -> torch.Tensor:
        return model.encode_images(_planes(frames)).view(*frames.shape[:2], GRID, GRID, -1)

    def parts(self, model) -> dict[str, torch.nn.Module]:
        llm = model.llm
        return {"decoder": llm.model, "head": llm.lm_head, "siglip": model.vision_tower}

    def vision_parameters(self, model) -> list[torch.nn.Parameter]:
        return [*model.vision_tower.parameters(), *model.mm_projector.parameters()]


def _planes(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (batch, frames, h, w, 3) → float32 (batch · frames, 3, SIDE, SIDE), as PIL resizes."""
    flat = frames.flatten(0, 1)
    if flat.shape[1:3] != (SIDE, SIDE):
        resized = [Image.fromarray(frame).resize((SIDE, SIDE)) for frame in flat.numpy()]
        flat = torch.from_numpy(np.stack([np.asarray(frame) for frame in resized]))
    return flat.permute(0, 3, 1, 2).float() / 127.5 - 1


def _without_type(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "model_type"}


FAMILY = TinyVila()
