"""Tracers see no values, on which the tokens that a prompt keeps depend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import FAMILIES, text
from torch import Tensor, nn

import tokencomp
from tokencomp.errors import UnsupportedModelError

NAMES = ("input_ids", "attention_mask", "pixel_values")


class Logits(nn.Module):
    """A model with arguments by position, as `torch.jit.trace` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *values: Tensor) -> Tensor:
        inputs = dict(zip(NAMES, values, strict=True))
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


def exported(model: nn.Module, inputs: dict[str, Any]) -> None:
    torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)


def traced(model: nn.Module, inputs: dict[str, Any]) -> None:
    torch.jit.trace(Logits(model), tuple(inputs[name] for name in NAMES), check_trace=False)


def differentiated(model: nn.Module, inputs: dict[str, Any]) -> None:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        call = {**inputs, "use_cache": False}
        logits: Tensor = torch.func.functional_call(model, weights, (), call).logits
        return logits.sum()

    torch.func.grad(loss)(dict(model.named_parameters()))


@pytest.mark.parametrize("trace", [exported, traced, differentiated])
def test_prompts_with_media_are_refused(trace: Callable[..., None]) -> None:
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(6, 3)]])
    with torch.set_grad_enabled(trace is differentiated):
        with tokencomp.patch(model, 0.5), pytest.raises(UnsupportedModelError, match="was traced"):
            trace(model, inputs)
        trace(model, inputs)
