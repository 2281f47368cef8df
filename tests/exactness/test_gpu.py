"""On a GPU: the patched model gives what it gives on a CPU, and under FlashAttention 2 what it
gives under SDPA. The CPU suite ties all of it to the masked run."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES
from support.prompts import ragged
from torch import Tensor, nn

import tokencomp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "qwen3_vl"]),
]
STEPS = 4


class Forced:
    """A logits processor that makes `generate` follow given tokens (B, T)."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.tokens[:, ids.shape[1] - self.prompt, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def logits(
    model: nn.Module, inputs: dict[str, Tensor], plan: Any, device: str, dtype: torch.dtype
) -> Tensor:
    """Logits (STEPS, B, V), fp32 on the CPU, of the patched model along fixed tokens."""
    model.to(device, dtype)
    moved = {
        k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()
    }
    tokens = torch.arange(3, 3 + 3 * STEPS).view(3, STEPS)
    forced = [Forced(tokens, inputs["input_ids"].shape[1])]
    with tokencomp.patch(model, plan=plan):
        out = oracle.generate(model, moved, steps=STEPS, logits_processor=forced)
    assert torch.equal(out.sequences[:, -STEPS:].cpu(), tokens)
    return torch.stack(out.logits).float().cpu()


@pytest.mark.parametrize("plan", [*plans.NAMES, plans.MERGED])
def test_gpu_equals_cpu(name: str, plan: str) -> None:
    family = FAMILIES[name]
    inputs, stages = ragged(family), plans.make(plan, family.layers)
    want = logits(family.build(), inputs, stages, "cpu", torch.float32)
    got = logits(family.build(), inputs, stages, "cuda", torch.float32)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("plan", plans.QUESTION_FREE)
def test_flash_attention_equals_sdpa(name: str, plan: str) -> None:
    """In bf16, judged as FlashAttention judges itself: at most twice SDPA's distance from fp32.

    Plans whose choice depends on no score: a near tie in bf16 may fall either way.
    """
    family = FAMILIES[name]
    inputs, stages = ragged(family), plans.make(plan, family.layers)
    exact = logits(family.build(), inputs, stages, "cuda", torch.float32)
    found = {}
    for backend in ("sdpa", "flash_attention_2"):
        model = family.build().to("cuda", torch.bfloat16)
        model.set_attn_implementation(backend)
        found[backend] = logits(model, inputs, stages, "cuda", torch.bfloat16)
    sdpa, flash = found["sdpa"], found["flash_attention_2"]
    scale = exact.abs().max()
    assert (flash - exact).abs().max() <= 2 * (sdpa - exact).abs().max() + 1e-3 * scale
