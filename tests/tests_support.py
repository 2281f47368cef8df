"""One row per model family: a tiny random model, and prompts for it.

Adding a family to the exactness suite is one `Family` subclass here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

V4 = transformers.__version__.startswith("4")
PAD, EOS, IMAGE, VIDEO, START, END = 0, 2, 150, 151, 152, 153
VOCAB = 200
NO_EOS = 199


@dataclass
class Media:
    """One image or video: its placeholders' ids, and model inputs."""

    ids: list[int]
    inputs: dict[str, Tensor]


class Family:
    """How to build a model and its media; the rest of the suite is shared."""

    name: ClassVar[str]
    mrope: ClassVar[bool] = False
    layers: ClassVar[int] = 4

    def config(self) -> Any:
        raise NotImplementedError

    def build(self, backend: str = "sdpa", seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.model_class()(self.config()).eval()
        with torch.no_grad():
            for p in self.decoder(model).parameters():
                if p.ndim == 2:
                    p.mul_(5)  # sharp attention, so that mistakes show
            for name, p in model.named_parameters():
                if "bias" in name or name.endswith("norm.weight"):
                    p.add_(torch.randn_like(p) * 0.02)
        model.set_attn_implementation(backend)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = NO_EOS
        model.generation_config.do_sample = False
        return model

    def model_class(self) -> type:
        raise NotImplementedError

    def image(self, size: int = 0) -> Media:
        """An image; `size` 0, 1, 2 are different grids."""
        raise NotImplementedError

    def video(self, frames: int = 4) -> Media:
        raise NotImplementedError

    def batch(self, rows: list[list[Any]]) -> dict[str, Tensor]:
        """Left-padded batch from rows of text ids (lists of ints) and `Media`."""
        ids, parts = [], []
        for row in rows:
            flat: list[int] = []
            for item in row:
                flat += item.ids if isinstance(item, Media) else item
                parts += [item.inputs] if isinstance(item, Media) else []
            ids.append(flat)
        width = max(map(len, ids))
        input_ids = torch.tensor([[PAD] * (width - len(r)) + r for r in ids])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])
        out = {"input_ids": input_ids, "attention_mask": mask}
        for key in dict.fromkeys(k for p in parts for k in p):
            out[key] = torch.cat([p[key] for p in parts if key in p])
        return self.finish(out)

    def finish(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = inspect.signature(self.model_class().forward).parameters
        if self.mrope and "mm_token_type_ids" in parameters:
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return inputs

    def decoder(self, model: nn.Module) -> nn.Module:
        """The text decoder."""
        return model.model.language_model

    def positions(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Positions of the uncompressed prompt, (3, B, L) or (B, L)."""
        mask = inputs["attention_mask"]
        if not self.mrope:
            return (mask.cumsum(-1) - 1).clamp(min=0)
        keys = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        extra = {k: inputs[k] for k in keys if k in inputs}
        return model.model.get_rope_index(inputs["input_ids"], attention_mask=mask, **extra)[0]


class Qwen2VL(Family):
    name = "qwen2_vl"
    mrope = True

    def model_class(self) -> type:
        return transformers.Qwen2VLForConditionalGeneration

    def config(self) -> Any:
        section = {"mrope_section": [2, 3, 3]}
        rope = (
            {
                "rope_theta": 1e4,
                "rope_scaling": {"type": "mrope", "rope_type": "default", **section},
            }
            if V4
            else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **section}}
        )
        return transformers.Qwen2VLConfig(
            text_config=dict(
                vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, **rope,
            ),
            vision_config=dict(
                depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=4,
                temporal_patch_size=2, spatial_merge_size=2, in_channels=3,
            ),
            image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=START, vision_end_token_id=END,
        )  # fmt: skip

    def _media(self, grid: tuple[int, int, int], token: int, prefix: str) -> Media:
        t, h, w = grid
        pixels = torch.randn(t * h * w, 96)
        suffix = "" if prefix == "image" else "_videos"
        inputs = {f"pixel_values{suffix}": pixels, f"{prefix}_grid_thw": torch.tensor([grid])}
        return Media([START] + [token] * (t * h * w // 4) + [END], inputs)

    def image(self, size: int = 0) -> Media:
        return self._media([(1, 8, 8), (1, 4, 8), (1, 6, 10)][size], IMAGE, "image")

    def video(self, frames: int = 4) -> Media:
        return self._media((frames // 2, 4, 8), VIDEO, "video")


class LlavaOnevision(Family):
    name = "llava_onevision"

    def model_class(self) -> type:
        return transformers.LlavaOnevisionForConditionalGeneration

    def config(self) -> Any:
        return transformers.LlavaOnevisionConfig(
            text_config=transformers.Qwen2Config(
                vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
            ),
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                image_size=16, patch_size=4,
            ),
            image_token_id=IMAGE, video_token_id=VIDEO,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
            vision_feature_layer=-1, vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        height, width = [(32, 32), (16, 32), (32, 20)][size]
        tiles = 5 if size != 1 else 3
        # the mosaic is cropped to the image's aspect ratio, then every row gets a line break
        rows, cols = {0: (8, 8), 1: (4, 8), 2: (8, 6)}[size]
        pixels = torch.randn(1, 5, 3, 16, 16)
        pixels[:, tiles:] = 0
        n = 16 + rows * (cols + 1)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
        return Media([IMAGE] * n + [7], inputs)

    def video(self, frames: int = 4) -> Media:
        pixels = torch.randn(1, frames, 3, 16, 16)
        return Media([VIDEO] * (frames * 4 + 1) + [7], {"pixel_values_videos": pixels})


FAMILIES: dict[str, Family] = {f.name: f for f in (Qwen2VL(), LlavaOnevision())}


def text(n: int, seed: int = 1) -> list[int]:
    """`n` text token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 140, (n,), generator=generator).tolist()


def one_row(inputs: dict[str, Tensor], model: nn.Module, n: int) -> dict[str, Tensor]:
    """First `n` columns removed from a single-row prompt (its padding)."""
    return {k: v[:, n:] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
