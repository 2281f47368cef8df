"""Models whose decoder layers are of several kinds: linear, sliding, and full attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers

from support.family.base import (
    END,
    ENDS,
    IDS,
    IMAGE,
    SIGLIP,
    START,
    TEXT,
    TOWER,
    VIDEO,
    VOCAB,
    Family,
    Media,
)
from support.family.inkling import Inkling
from support.family.qwen import Qwen3VL
from tokencomp.adapters.verified import verified_types

WINDOW = 8


class Qwen35(Qwen3VL):
    """Three layers of gated DeltaNet to one of full attention."""

    name = "qwen3_5"
    architecture = "Qwen3_5ForConditionalGeneration"

    def config(self) -> Any:
        section = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, **section}
        return transformers.Qwen3_5Config(
            text_config=dict(
                TEXT, bos_token_id=None, head_dim=32, linear_num_key_heads=2,
                linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
                layer_types=["linear_attention", "full_attention"] * 2, rope_parameters=rope,
            ),
            vision_config=dict(TOWER, num_position_embeddings=64),
            **IDS, **ENDS,
        )  # fmt: skip

    def build(self, backend: str = "sdpa", seed: int = 0) -> Any:
        model = super().build(backend, seed)
        for name, p in model.named_parameters():  # states that neither vanish nor explode
            if "dt_bias" in name or "A_log" in name:
                torch.nn.init.uniform_(p, -2, 1)
        return model


class Qwen35Moe(Qwen35):
    """Mixture-of-experts layers in the same decoder."""

    name = "qwen3_5_moe"
    architecture = "Qwen3_5MoeForConditionalGeneration"

    def config(self) -> Any:
        dense, names = super().config().to_dict(), ("model_type", "intermediate_size")
        text = {k: v for k, v in dense["text_config"].items() if k not in names}
        vision = {k: v for k, v in dense["vision_config"].items() if k != "model_type"}
        experts = dict(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )  # fmt: skip
        return transformers.Qwen3_5MoeConfig(
            text_config={**text, **experts}, vision_config=vision,
            **IDS, **ENDS,
        )  # fmt: skip


class Gemma3(Family):
    """Sliding and full layers; tokens of an image see each other in both."""

    name = "gemma3"
    architecture = "Gemma3ForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Gemma3Config(
            text_config=dict(
                TEXT, head_dim=16, sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            vision_config=dict(SIGLIP, image_size=32, patch_size=4),
            mm_tokens_per_image=16, image_token_id=IMAGE, image_token_index=IMAGE,
            boi_token_index=START, eoi_token_index=END,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        return Media([START, *[IMAGE] * 16, END], {"pixel_values": torch.randn(1, 3, 32, 32)})

    def finish(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs


class Gemma4(Gemma3):
    """Image blocks in sliding layers alone, as in the 26B and 31B models."""

    name = "gemma4"
    architecture = "Gemma4ForConditionalGeneration"
    layers = 6
    extra: ClassVar[dict[str, Any]] = {"use_bidirectional_attention": "vision"}

    def config(self) -> Any:
        extra = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, **self.extra}
        return transformers.Gemma4Config(
            text_config=dict(
                TEXT, vocab_size_per_layer_input=VOCAB, num_hidden_layers=6, head_dim=16,
                global_head_dim=16, sliding_window=WINDOW, **extra,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            ),
            vision_config=dict(
                SIGLIP, num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2,
            ),
            audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=154,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        """8 × 8 patches, of which four become a token, with their places (x, y)."""
        places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(1)[None]
        inputs = {"pixel_values": torch.rand(1, 64, 48), "image_position_ids": places}
        return Media([START, *[IMAGE] * 16, END], inputs)

    def whole_video(self, frames: int) -> Media:
        """A time before every frame."""
        image, ids = self.image(), []
        for t in range(frames // 2):
            ids += [141 + t, START, *[VIDEO] * 16, END]
        inputs = {
            "pixel_values_videos": torch.rand(frames // 2, 64, 48),
            "video_position_ids": image.inputs["image_position_ids"].repeat(frames // 2, 1, 1),
            "num_frames_per_video": torch.tensor([frames // 2]),
        }
        return Media(ids, inputs)

    def finish(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        return inputs


class Gemma4E(Gemma4):
    """Per-layer inputs, and layers that share keys and values, as in the E2B and E4B models."""

    name = "gemma4_e"
    extra: ClassVar[dict[str, Any]] = {
        "use_bidirectional_attention": None,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 3,
    }


class Lfm2Vl(Family):
    """Short convolutions and full attention, behind a SigLIP 2 tower on padded patches."""

    name = "lfm2_vl"
    architecture = "Lfm2VlForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Lfm2VlConfig(
            text_config=dict(
                TEXT, model_type="lfm2", block_auto_adjust_ff_dim=False,
                layer_types=["conv", "full_attention"] * 2,
            ),
            vision_config=dict(
                model_type="siglip2_vision_model", hidden_size=32, intermediate_size=48,
                num_hidden_layers=1, num_attention_heads=2, patch_size=4, num_patches=64,
                vision_use_head=False,
            ),
            image_token_id=IMAGE, projector_hidden_size=32, downsample_factor=2,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        """Four patches a token; smaller images are padded to 64 patches."""
        h, w = [(8, 8), (4, 8), (6, 4)][size]
        inputs = {
            "pixel_values": torch.randn(1, 64, 48),
            "pixel_attention_mask": (torch.arange(64) < h * w).long()[None],
            "spatial_shapes": torch.tensor([[h, w]]),
        }
        return Media([START, *[IMAGE] * (h * w // 4), END], inputs)


class MiniCpmV46(Qwen35):
    """The decoder of Qwen3.5 with one position per token, behind windows merged in the tower."""

    name = "minicpmv4_6"
    architecture = "MiniCPMV4_6ForConditionalGeneration"
    mrope = False

    def config(self) -> Any:
        return transformers.MiniCPMV4_6Config(
            text_config={**super().config().text_config.to_dict(), "model_type": "qwen3_5_text"},
            vision_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                image_size=64, patch_size=4, insert_layer_id=0,
            ),
            insert_layer_id=0, image_size=64, image_token_id=IMAGE, video_token_id=VIDEO,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        """Sixteen patches a token, packed side by side."""
        h, w = [(16, 16), (8, 16), (12, 8)][size]
        inputs = {
            "pixel_values": torch.randn(1, 3, 4, 4 * h * w),
            "target_sizes": torch.tensor([[h, w]]),
        }
        return Media([START, *[IMAGE] * (h * w // 16), END], inputs)

    def video(self, frames: int = 4) -> Media:
        return self.image()

    def whole_video(self, frames: int) -> Media:
        """Every frame is like an image."""
        ids, count = [START, *[VIDEO] * 8, END], frames // 2
        inputs = {
            "pixel_values_videos": torch.randn(1, 3, 4, count * 4 * 128),
            "target_sizes_videos": torch.tensor([[8, 16]] * count),
        }
        return Media(ids * count, inputs)

    def collect(self, rows: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        media = [one for row in rows for one in row]
        result = {}
        for name in dict.fromkeys(name for one in media for name in one):
            parts = [one[name] for one in media if name in one]
            result[name] = torch.cat(parts, dim=-1 if "pixel" in name else 0)
        return result

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return Family.positions(self, model, inputs)


# Those that the installed release has; a module names them as `FAMILY_NAMES`.
HYBRID: dict[str, Family] = {
    f.name: f
    for f, model_type in (
        (Qwen35(), "qwen3_5"),
        (Gemma3(), "gemma3"),
        (Gemma4(), "gemma4"),
        (Gemma4E(), "gemma4"),
        (Lfm2Vl(), "lfm2_vl"),
        (MiniCpmV46(), "minicpmv4_6"),
        (Inkling(), "inkling_mm_model"),
    )
    if model_type in verified_types()
}


def with_window(family: Family, window: int) -> torch.nn.Module:
    """A model of a family whose layers with a window all have this one."""
    model = family.build()
    for module in family.decoder(model).modules():
        for owner in (module, getattr(module, "config", None)):
            if getattr(owner, "sliding_window", None):
                owner.sliding_window = window
    return model
