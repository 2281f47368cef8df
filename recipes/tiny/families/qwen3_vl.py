"""Tiny Qwen3-VL: 16 thin decoder layers, interleaved M-RoPE, position table, deepstack.

The decoder is deep because staged methods need depth: with 16 layers each acts where its paper puts
it. The tower has a learned position table and the columns of a grid have a phase of their own in
the interleaved M-RoPE, so questions about places can be learnt.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

import numpy as np
import torch

from recipes.tiny.families.parts import HALF, Encode, chatml, decoder
from recipes.tiny.families.qwen2_vl import MERGE, PAIR, PATCH, TinyQwen2VL
from recipes.trainer import attend
from tokencomp.zoo.shapesqa.lettering import WORDS

_PLACES = ("row", "column", "side", "over", "when", "moves", "flashes", "many", "number", "seconds")
CORPUS = (
    *(form for word in (*_PLACES, *WORDS) for form in (word, f" {word}", f"({word}")),
    "What does the text say? What number is written?",
    "<0.2 seconds>",
)


class TinyQwen3VL(TinyQwen2VL):
    """See :class:`~recipes.tiny.families.Family`."""

    # Without marks around the video: the processor sets marks around each pair of frames, and
    # whether it keeps outer ones depends on the version of transformers.
    chat_template = chatml(
        "<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>", system=False
    )
    corpus = CORPUS
    first_frame = 0.0
    """When a clip shows its first frame, in frames; 0.5 for files of which middles are read."""
    card: ClassVar[dict[str, str]] = {
        "note": "The stages from `numbers` on were added after the first twelve had been trained "
        "and measured: that card showed which families needed more (reading, action counts, some "
        "option letters), training and validation accuracy showed what helps. The head that names "
        "both digits of a number joined with them. The stages `figures` and `settle` came "
        "next, because numbers among options had been at chance, and `tallies` last, because "
        "letters of counts and written numbers were at 90 %. All three started at the weights "
        "published before. The command repeats the recipe, not these exact weights."
    }

    def config(self, tokenizer) -> dict[str, Any]:
        token = tokenizer.convert_tokens_to_ids
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]}
        text = {
            **decoder(tokenizer),
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 16,
            "num_key_value_heads": 1,
            "intermediate_size": 192,
            "head_dim": 64,
            "attention_bias": False,
            "rope_theta": 5000000.0,
            "rope_scaling": rope,
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "torch_dtype": "float16",
            "tie_word_embeddings": False,
            "text_config": text,
            "image_token_id": token("<|image_pad|>"),
            "video_token_id": token("<|video_pad|>"),
            "vision_start_token_id": token("<|vision_start|>"),
            "vision_end_token_id": token("<|vision_end|>"),
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 8,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 3,
                "out_hidden_size": text["hidden_size"],
                "num_position_embeddings": 256,
                "deepstack_visual_indexes": [3],
                "in_channels": 3,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": PAIR,
                "hidden_act": "gelu_pytorch_tanh",
            },
        }

    def build(self, tokenizer) -> torch.nn.Module:
        model: Any = super().build(tokenizer)
        batch_tower_attention(model.model.visual)
        return model

    def parts(self, model) -> dict[str, torch.nn.Module]:
        return {**super().parts(model), "deep tower": model.model.visual}

    def statistics(self) -> tuple[list[float], list[float]]:
        return HALF, HALF

    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        mean, std = self.statistics()
        pixels = {
            "processor_class": "Qwen3VLProcessor",
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": PAIR,
            "image_mean": mean,
            "image_std": std,
        }
        image = {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
        }
        # The limits of a video count the pixels of all its frames.
        limits = {"shortest_edge": 8 * self.min_pixels, "longest_edge": 32 * self.max_pixels}
        video = {
            "video_processor_type": "Qwen3VLVideoProcessor",
            **pixels,
            "size": limits,
            "do_sample_frames": False,
        }
        return {
            "config.json": self.config(tokenizer),
            "preprocessor_config.json": image,
            "video_preprocessor_config.json": video,
        }

    def weight_name(self, name: str) -> str:
        return name

    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of frames stands between vision marks of its own, after its time."""
        if kind == "image":
            return super().expand(ids, kind, shape, encode, fps)
        t, rows, columns = self.grid(kind, shape)
        *before, pad = ids
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        position = 0

        def text(more) -> None:
            nonlocal position
            tokens.extend(more)
            positions.append(np.tile(np.arange(position, position + len(more)), (3, 1)))
            position += len(more)

        text(before)
        for pair in range(t):
            # The processor writes the mean time of the two frames.
            time = (2 * pair + 0.5 + self.first_frame) / fps
            text(encode(f"<{time:.1f} seconds><|vision_start|>"))
            tokens.extend([pad] * (rows * columns))
            positions.append(np.indices((1, rows, columns)).reshape(3, -1) + position)
            position += max(rows, columns)
            text(encode("<|vision_end|>"))
        return np.asarray(tokens, np.int64), np.concatenate(positions, 1).astype(np.int64)


def batch_tower_attention(tower) -> None:
    """Let a tower attend within all pictures of a training batch in one call."""
    for block in tower.blocks:
        block.attn.forward = MethodType(_batched_attention, block.attn)


def _batched_attention(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """Tower attention for pictures of one size: one call instead of one per picture.

    A training batch holds pictures of one size only; the stock forward pass loops over them.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    n, length = len(hidden_states), int(cu_seqlens[1])
    qkv = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1)
    query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (
        x.reshape(n // length, length, self.num_heads, -1).transpose(1, 2)
        for x in (query, key, value)
    )
    out = attend(query, key, value, None)
    return self.proj(out.transpose(1, 2).reshape(n, -1))


FAMILY = TinyQwen3VL()
