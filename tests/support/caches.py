"""Caches of transformers, and plans that the tests of caches and of compiled decoding share."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, QuantizedCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import tokencomp

ENTRY = tokencomp.Plan((tokencomp.Stage(0, 0.4, tokencomp.make_reducer("uniform")),))
LAYERS = tokencomp.Plan((tokencomp.Stage(3, 0.4, tokencomp.make_reducer("uniform")),))


def static_cache(model: Any, length: int) -> StaticCache:
    """A static cache of `length` rows, with the arguments of the installed release."""
    config = model.config.get_text_config(decoder=True)
    return StaticCache(config=config, max_cache_len=length)


class RoundedLayer(QuantizedLayer):
    """Four bits, with a scale for every row of every head, and the last rows as they are."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = (tensor.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-9)
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, rounded: tuple[Tensor, Tensor]) -> Tensor:
        return rounded[0] * rounded[1]


def quantized_cache(backend: str, model: Any) -> Any:
    """A quantized cache: "fp8" or "quanto" of transformers, or "rounded", which needs nothing."""
    config = model.config.get_text_config(decoder=True)
    if backend == "rounded":
        return Cache(layers=[RoundedLayer() for _ in range(config.num_hidden_layers)])
    if backend == "fp8":
        if "fp8" not in inspect.getsource(QuantizedCache):
            pytest.skip("this release has no fp8 cache")
        return QuantizedCache(backend, config)
    if not _has("optimum.quanto" if _has("optimum") else "optimum"):
        pytest.skip("optimum-quanto is not installed")
    return QuantizedCache(backend, config, nbits=4, q_group_size=16, residual_length=4)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
