"""Attention whose class is derived elsewhere, or that is compiled by itself, without its layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, text
from torch import nn

import tokencomp
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib.compat import attention_function


def derived(layer: Any) -> None:
    base = type(layer.self_attn)

    class Derived(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer.self_attn.__class__ = Derived


def wrapped(layer: Any) -> None:
    layer.self_attn = torch.compile(layer.self_attn, backend="eager")


def compiled(layer: Any) -> None:
    layer.self_attn.compile(backend="eager")


CASES = [
    *[(derived, "sdpa", "auto"), (derived, "eager", "auto"), (derived, "eager", "fastv")],
    *[(way, "sdpa", reducer) for way in (wrapped, compiled) for reducer in ("auto", "condiv")],
    (wrapped, "sdpa", "fastv"),
]


@pytest.mark.parametrize(("way", "backend", "reducer"), CASES)
@torch.no_grad()
def test_logits_are_those_of_the_model_itself(way: Any, backend: str, reducer: str) -> None:
    """`auto` hands attention the weights of merged tokens; the others read queries and keys."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(backend), family.batch([[text(3), family.image(), text(6, 3)]])
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        expected, kept = model(**inputs).logits, handle.stats.kept(0)
    for layer in family.decoder(model).layers:
        way(layer)
    before = [vars(m).get("config") for m in model.modules()]
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        found = model(**inputs).logits
        assert handle.stats.kept(0) == kept
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert [vars(m).get("config") for m in model.modules()] == before
    torch._dynamo.reset()


def test_attention_that_names_no_backend_is_refused() -> None:
    """Neither the module of its class nor those of its bases have a list of backends."""
    with pytest.raises(UnsupportedModelError, match="beside MultiheadAttention"):
        attention_function(nn.MultiheadAttention(8, 2), None)
