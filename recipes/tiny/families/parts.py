"""What the tiny families share: the chat format, the decoder, the SigLIP tower, common answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from recipes.tiny.tokenizer import SPECIAL_TOKENS, SYSTEM, write_tokenizer

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


def start_wide(*configs: Any) -> None:
    """Draw initial weights of about 1 / sqrt(width); narrow models learn slowly from 0.02."""
    for config in configs:
        config.initializer_range = 0.06


class Family(ABC):
    """What training, evaluation and packing need to know of an architecture."""

    chat_template: str
    cell: int
    """Side in pixels of the square that one token of :meth:`tokens` covers in training."""
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    """Special tokens of the vocabulary, in the order of their ids."""
    token_names: ClassVar[dict[str, str]] = {}
    """Special tokens that the processor looks up by a name, such as "boi_token"."""
    kinds: tuple[str, ...] = ("image", "video")
    """Media that its processor takes."""
    text_folder: str = ""
    """Where the tokenizer lies in the model folder: "" is the folder itself."""
    corpus: tuple[str, ...] = ()
    """Text that the tokenizer is trained on beside that of all families."""
    card: ClassVar[dict[str, str]] = {}
    """What the model card says differently: see :data:`~recipes.tiny.card.USUAL`."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        write_tokenizer(
            folder, self.chat_template, self.special_tokens, self.corpus, self.token_names
        )

    @abstractmethod
    def config(self, tokenizer) -> dict[str, Any]:
        """The main configuration, for the vocabulary of ``tokenizer``."""

    def build(self, tokenizer) -> torch.nn.Module:
        """A freshly initialised model of the stock HF class that the configuration names."""
        import transformers

        values = self.config(tokenizer)
        config = transformers.AutoConfig.for_model(**values)
        start_wide(config, config.get_text_config(), config.vision_config)
        return getattr(transformers, values["architectures"][0])(config)

    @abstractmethod
    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        """Configuration files of the HF folder, by file name (with its subfolder)."""

    def weight_name(self, name: str) -> str:
        """Name of a parameter in published checkpoints; "folder/name" in a sub-checkpoint."""
        return name

    def hidden(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """Last hidden states (batch, length, hidden) for model inputs, without the head."""
        return model.model(**inputs, use_cache=False).last_hidden_state

    def parts(self, model) -> dict[str, torch.nn.Module]:
        """Modules that a model of another family may start from, by what they are."""
        return {"decoder": model.model.language_model, "head": model.lm_head}

    @abstractmethod
    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Expand the one placeholder in ``ids`` for media of (frames, height, width) px.

        ``encode`` and ``fps`` are for families that write the time before each frame of a video.
        Returns ids (n,) and positions (rows, n), both int64.
        """

    @abstractmethod
    def pixels(self, frames: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        """Model inputs for uint8 frames (batch, frames, height, width, 3).

        The same numbers as the HF processor gives, computed for the whole batch at once.
        """

    @abstractmethod
    def tokens(self, model, frames: torch.Tensor, kind: str) -> torch.Tensor:
        """Projected tokens (batch, t, rows, columns, hidden), before pooling, none special.

        ``t`` is 1 where a token covers a pair of frames, else the number of frames.
        """

    @abstractmethod
    def vision_parameters(self, model) -> list[torch.nn.Parameter]:
        """Vision tower and projector."""

    def language_config(self, model) -> Any:
        """Config of the text decoder."""
        return model.config.get_text_config()

    def placeholder(self, kind: str) -> str:
        """The text of the token that stands for one visual token of an image or a video."""
        return f"<|{kind}_pad|>"

    @abstractmethod
    def tokens_per(self, kind: str, shape: tuple[int, int, int]) -> int:
        """Visual tokens of one image or video of (frames, height, width) px."""


class SiglipFamily(Family):
    """What models with a SigLIP tower and a projector beside their decoder share."""

    def weight_name(self, name: str) -> str:
        for ours, theirs in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.", ""),
        ):
            if name.startswith(ours):
                return theirs + name[len(ours) :].removeprefix("vision_model.")
        return name

    def vision_parameters(self, model) -> list[torch.nn.Parameter]:
        parts = (model.model.vision_tower, model.model.multi_modal_projector)
        return [p for part in parts for p in part.parameters()]
