"""A VILA folder in the published layout, tiny and random, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MEDIA = ("<image>", "<vila/video>")


def tokenizer(media: bool = True) -> Any:
    """One token per byte, then special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if media:
        made.add_tokens(list(MEDIA), special_tokens=True)
    return made


def llm_config(kind: str) -> Any:
    cls = transformers.Qwen2Config if kind == "qwen2" else transformers.LlamaConfig
    return cls(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def projector_state(kind: str, vision: int, hidden: int) -> dict[str, torch.Tensor]:
    """Weights under the names and shapes of published checkpoints, written out by hand."""
    shapes: dict[str, tuple[int, ...]]
    if kind == "mlp_downsample_3x3_fix":
        shapes = {
            "layers.1": (9 * vision,), "layers.2": (3 * vision, 9 * vision),
            "layers.4": (3 * vision,), "layers.5": (hidden, 3 * vision),
            "layers.7": (hidden, hidden),
        }  # fmt: skip
    elif kind == "mlp2x_gelu":
        shapes = {"layers.0": (hidden, vision), "layers.2": (hidden, hidden)}
    else:
        shapes = {
            "layers.1": (4 * vision,), "layers.2": (hidden, 4 * vision),
            "layers.4": (hidden, hidden),
        }  # fmt: skip
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) * 0.2
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.2
    return state


def write(
    folder: Path,
    projector: str = "mlp_downsample_2x2_fix",
    llm: str = "qwen2",
    media: bool = True,
    **root: Any,
) -> Path:
    """Make the folder part by part, without any code under test."""
    torch.manual_seed(1)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=4,
    )  # fmt: skip
    config = llm_config(llm)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llm")
    tokenizer(media).save_pretrained(folder / "llm")
    transformers.SiglipVisionModel(vision).save_pretrained(folder / "vision_tower")
    processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "vision_tower")
    (folder / "mm_projector").mkdir()
    save_file(projector_state(projector, 32, 64), folder / "mm_projector" / "model.safetensors")
    about = {"mm_projector_type": projector, "model_type": "v2l_projector"}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(about))
    base = {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "resize", "num_video_frames": 4, "chat_template": "vicuna_v1",
        "hidden_size": 64, "mm_hidden_size": 32, "tune_language_model": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**base, **root}))
    return folder
