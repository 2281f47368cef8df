"""What the tiny families share: the chat format, the decoder, the SigLIP tower, common answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from tokencomp.zoo.tokenizer import SPECIAL_TOKENS, SYSTEM, write_tokenizer

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens around it."""
HALF = [0.5, 0.5, 0.5]


def chatml(image: str, video: str, system: bool = True) -> str:
    """Qwen2's chat format, by default with a system turn; media stand where their part stands."""
    turn = (
        "{%- if loop.first and message['role'] != 'system' -%}"
        "{{- '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' -}}"
        "{%- endif -%}"
    )
    return (
        "{%- for message in messages -%}" + (turn if system else "") + ""
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}"
        "{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] in ('image', 'image_url') -%}"
        "{{- '" + image + "' -}}"
        "{%- elif part['type'] == 'video' -%}"
        "{{- '" + video + "' -}}"
        "{%- elif 'text' in part -%}{{- part['text'] -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def decoder(tokenizer) -> dict[str, Any]:
    """The Qwen2 decoder of every tiny model, in the oldest form of its configuration."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": False,
    }


def siglip(side: int, patch: int) -> dict[str, Any]:
    """The SigLIP tower for squares of ``side`` px."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }


def preprocessing(size: dict[str, int], mean: list[float], std: list[float]) -> dict[str, Any]:
    """Image and video processor settings that all families spell alike."""
    return {
        "size": size,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": mean,
        "image_std": std,
    }


def siglip_checkpoint_name(name: str) -> str:
    """Name of a parameter in published checkpoints of models with a SigLIP tower."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :].removeprefix("vision_model.")
    return name


def start_wide(*configs: Any) -> None:
    """Initial weights of about 1 / sqrt(width): the usual 0.02 starts slowly this narrow."""
    for config in configs:
        config.initializer_range = 0.06


class TinyFamily:
    """Answers that most families give; see :class:`~tokencomp.zoo.families.Family`."""

    chat_template: str
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    token_names: ClassVar[dict[str, str]] = {}
    kinds: tuple[str, ...] = ("image", "video")
    text_folder: str = ""
    corpus: tuple[str, ...] = ()
    card: ClassVar[dict[str, str]] = {}

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer(
            folder, self.chat_template, self.special_tokens, self.corpus, self.token_names
        )

    def hidden(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        return model.model(**inputs, use_cache=False).last_hidden_state

    def parts(self, model) -> dict[str, torch.nn.Module]:
        return {"decoder": model.model.language_model, "head": model.lm_head}

    def language_config(self, model) -> Any:
        return model.config.get_text_config()
