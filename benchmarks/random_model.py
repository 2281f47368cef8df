"""A Qwen2-VL with random weights, for benchmarks of time, memory and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def qwen2_vl(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    *,
    sections: Sequence[int],
    ids: dict[str, int],
    theta: float = 1e6,
    tied: bool = False,
    **vision: int,
) -> Any:
    """The model, by the sizes of its decoder; its tower has one layer.

    Parameters
    ----------
    sections
        Of M-RoPE: half dimensions of a head for time, height and width.
    ids
        Special tokens by their names in the configuration, such as `image_token_id`.
    vision
        What the configuration of the tower has beside its usual values.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": [*sections]}
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_parameters": rope,
    }
    tower = {"depth": 1, "embed_dim": 32, "hidden_size": hidden, "num_heads": 2, **vision}
    config = Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **ids)
    return Qwen2VLForConditionalGeneration(config).eval()
