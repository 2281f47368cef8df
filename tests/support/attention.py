"""Rotated q and k of a layer, captured where the model's own eager attention uses them."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from support.families import Family


def queries_and_keys(
    model: nn.Module, family: Family, inputs: dict[str, Tensor], layer: int
) -> tuple[Tensor, Tensor, float]:
    """q (heads, n, d), k (kv heads, n, d) and the logit scale of sample 0 at a decoder layer."""
    attn = family.decoder(model).layers[layer].self_attn
    module = sys.modules[type(attn).__module__]
    original, found = module.eager_attention_forward, {}

    def spy(mod, query, key, value, *args, **kwargs):
        if mod is attn:
            found.update(q=query[0].double(), k=key[0].double(), scale=mod.scaling)
        return original(mod, query, key, value, *args, **kwargs)

    module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        module.eager_attention_forward = original
    return found["q"], found["k"], found["scale"]
