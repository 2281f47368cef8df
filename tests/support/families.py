"""One row per model family: a tiny random model, and prompts for it.

Adding a family to the exactness suite is one `Family` subclass in `support.family`, listed here.
"""

from __future__ import annotations

import torch

from support.family.base import (
    END,
    EOS,
    IMAGE,
    NO_EOS,
    PAD,
    START,
    VIDEO,
    VOCAB,
    Family,
    Media,
)
from support.family.llava import Llava, LlavaNext, LlavaNextVideo, LlavaOnevision
from support.family.qwen import Qwen2VL, Qwen3VL, Qwen3VLMoe, Qwen25VL
from support.family.tiles import Idefics3, InternVL, SmolVLM
from support.family.vila import Vila

__all__ = [
    "CORE",
    "END",
    "EOS",
    "FAMILIES",
    "IMAGE",
    "NO_EOS",
    "PAD",
    "START",
    "VIDEO",
    "VOCAB",
    "Family",
    "Media",
    "text",
]

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Qwen2VL(),
        Qwen25VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
        Llava(),
        LlavaNext(),
        LlavaNextVideo(),
        LlavaOnevision(),
        InternVL(),
        SmolVLM(),
        Idefics3(),
        Vila(),
    )
}


# M-RoPE, M-RoPE with deepstack, and one position per token with and without line breaks.
CORE = ("qwen2_vl", "qwen3_vl", "llava_onevision", "internvl")


def text(n: int, seed: int = 1) -> list[int]:
    """`n` text token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 140, (n,), generator=generator).tolist()
