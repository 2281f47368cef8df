"""Backends of the user's own, with the masks that are registered for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import kinds, oracle, ways
from support.families import Family
from support.family.hybrid import HYBRID
from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils

import tokencomp

FAMILY_NAMES = sorted(HYBRID.keys() & {"gemma3", "gemma4", "gemma4_e"})


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Eager attention, which adds its mask to the logits."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def attend_where(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    """The same with a mask of bool, which is False at what is hidden."""
    if mask is not None:
        assert mask.dtype == torch.bool
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return attend(module, q, k, v, mask, **kw)


def make_numbers(*args: Any, **kwargs: Any) -> Tensor:
    return masking_utils.eager_mask(*args, **kwargs)


def make_bools(*args: Any, **kwargs: Any) -> Tensor:
    return masking_utils.sdpa_mask(*args, **kwargs)


PAIRS = {
    "eager": (attend, masking_utils.eager_mask),
    "numbers": (attend, make_numbers),
    "sdpa": (attend_where, masking_utils.sdpa_mask),
    "bools": (attend_where, make_bools),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_equals_the_masked_run(
    family: Family, pair: tuple[Callable[..., Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for interface, function in zip(
        (AttentionInterface, masking_utils.AttentionMaskInterface), pair, strict=True
    ):
        monkeypatch.setitem(interface._global_mapping, "own", function)
    model, inputs = family.build("eager"), ways.ragged(family)
    model.set_attn_implementation({"text_config": "own", "vision_config": "eager"})
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        out = ways.generated(model, inputs)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    width = inputs["input_ids"].shape[1]
    new = out.sequences[:, width:-1]
    expected = kinds.expected_logits(family.build("eager"), family, inputs, masks, new)
    assert (torch.stack(out.logits, 1) - expected[:, width - 1 :]).abs().max() < 5e-5
