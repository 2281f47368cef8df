"""A tiny model that listens: the stock Qwen2-Audio class, with random weights.

A clip of eight seconds becomes 200 tokens, as many per second as in the published model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sounds.questions import NUMBERS, ORDER
from recipes.sounds.scenes import NAMES, RATE, SECONDS
from recipes.tiny.families.parts import decoder
from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer

TOKENS = 200  # of a clip
BINS, WIDTH, LAYERS = 64, 128, 3  # of the spectrogram and the encoder
AUDIO = "<|AUDIO|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", AUDIO, "<|audio_eos|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\nAnswer:' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>\n' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
)
"""Clip, question, "Answer:", and the answer with a space before it, which makes it one token."""


def build_tokenizer(folder: Path) -> Any:
    """Write the tokenizer's files, and load it as any user does."""
    words = (*NAMES, *NUMBERS, *ORDER, "yes", "no", "last", "sounds")
    texts = tuple(f" {word}" for word in words) + tuple(f"{w}:" for w in words)
    texts += ("Which sound comes after the bell?", "Is the hum in the first or second half?")
    texts += ("Which sound is the longest?", "How many sounds are there?", "\nAnswer:")
    write_tokenizer(folder, TEMPLATE, SPECIAL, texts)
    return load_tokenizer(folder)


def build_processor(tokenizer: Any) -> Any:
    """The stock processor for mono clips of up to eight seconds."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(
        feature_size=BINS, sampling_rate=RATE, chunk_length=int(SECONDS), return_attention_mask=True
    )
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE, audio_token=AUDIO)


def build(tokenizer: Any) -> Any:
    """The model with random weights, float32."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2Config,
    )

    text = Qwen2Config(**{**decoder(tokenizer), "initializer_range": 0.06})
    encoder = Qwen2AudioEncoderConfig(
        num_mel_bins=BINS,
        encoder_layers=LAYERS,
        encoder_attention_heads=4,
        encoder_ffn_dim=3 * WIDTH,
        d_model=WIDTH,
        max_source_positions=2 * TOKENS,
        initializer_range=0.06,
    )
    audio = tokenizer.convert_tokens_to_ids(AUDIO)
    config = Qwen2AudioConfig(audio_config=encoder, text_config=text, audio_token_index=audio)
    return Qwen2AudioForConditionalGeneration(config)


def listening_parts(model: Any) -> list[torch.nn.Parameter]:
    """Encoder and projector."""
    parts = (model.model.audio_tower, model.model.multi_modal_projector)
    return [p for part in parts for p in part.parameters() if p.requires_grad]


def audio_tokens(model: Any, features: Tensor) -> Tensor:
    """Projected tokens (batch, TOKENS, hidden) of spectrograms (batch, BINS, 4 × TOKENS)."""
    encoded = model.model.audio_tower(features).last_hidden_state
    return model.model.multi_modal_projector(encoded)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model and its processor as a Hugging Face folder, in float32."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    return model.eval(), AutoProcessor.from_pretrained(folder)
