"""What a release of transformers could count otherwise: each fault raises instead of answering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import oracle
from support.families import FAMILIES, Family, text
from support.family.hybrid import HYBRID
from support.prompts import single
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

import tokencomp
from tokencomp.engine import cache as compressed
from tokencomp.errors import CacheError
from tokencomp.torchlib.cache_classes import STATES

COUNTS = hasattr(STATES(), "cumulative_length_linear")  # since transformers 5.25
STATEFUL = [name for name, f in HYBRID.items() if name in ("qwen3_5", "lfm2_vl", "minicpmv4_6")]


def conversation(family: Family, crop: int = 0, **options: Any) -> torch.Tensor:
    """Generate, crop the cache, then generate a later turn of three words on it."""
    model, inputs = family.build(), single(family)
    with tokencomp.patch(model, 0.5, reducer="uniform"), torch.no_grad():
        out = oracle.generate(model, inputs, 4, **options)
        cache, ids = oracle.cache_of(out), out.sequences
        if crop:
            cache.crop(-crop)
            ids = ids[:, : ids.shape[1] - crop]
        ids = torch.cat([ids, family.batch([[text(5, 3)]])["input_ids"]], 1)
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        if "mm_token_type_ids" in inputs:
            call["mm_token_type_ids"] = torch.zeros_like(ids)
        return oracle.generate(model, call, 2).sequences


@pytest.mark.parametrize("name", sorted(HYBRID))
def test_a_later_turn_without_faults(name: str) -> None:
    conversation(HYBRID[name])


@pytest.mark.skipif(not COUNTS, reason="layers with a state count no tokens in this release")
@pytest.mark.parametrize("name", STATEFUL)
def test_counters_of_rows_raise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a state count the rows that they read, unless the engine tells them columns."""
    monkeypatch.setattr(compressed, "count_columns", lambda cache, columns: None)
    with pytest.raises(CacheError, match=r"LinearAttentionLayer of transformers"):
        conversation(HYBRID[name])


def _shift(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """A fault: `change(self, result)` replaces the result of a method."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *a, **k: change(self, plain(self, *a, **k)))

    return install


def _nothing(owner: Any, name: str) -> Callable[[Any], None]:
    """A fault: a method does nothing."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, lambda self, *a, **k: None)


def _rows(cache: Any, _: Any) -> int:
    return int(compressed.physical_length(compressed.first_layer(cache)))


def _last_layer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "crop", lambda self, n: [x.crop(n) for x in self.layers[:-1]])


def _written_twice(layer: Any, result: Any) -> Any:
    layer.keys = torch.cat([layer.keys, layer.keys[..., -1:, :]], -2)
    return result


def _counted_twice(layer: Any, result: Any) -> Any:
    layer.cumulative_length.add_(1)
    return result


def _missed(layer: Any, result: Any) -> Any:
    layer.cumulative_length_linear.sub_(1)
    return result


SLIDING = compressed.CompressedSlidingLayer
STATIC = {"cache_implementation": "static"}
Fault = tuple[str, int, dict[str, Any], Callable[[Any], None]]
FAULTS: dict[str, Fault] = {
    "length in rows": ("qwen2_vl", 0, {}, _shift(Cache, "get_seq_length", _rows)),
    "length of a layer": ("gemma3", 0, {}, _shift(SLIDING, "get_seq_length", lambda s, n: n + 1)),
    "length off by one": ("llava", 0, {}, _shift(Cache, "get_seq_length", lambda s, n: n - 1)),
    "mask off by one": (
        "qwen2_vl", 0, {}, _shift(Cache, "get_mask_sizes", lambda s, n: (n[0] + 1, n[1])),
    ),
    "mask without dropped columns": (
        "qwen2_vl", 0, {}, _shift(Cache, "get_mask_sizes", lambda s, n: (n[0], 0)),
    ),
    "mask of a window": (
        "gemma3", 0, {}, _shift(SLIDING, "get_mask_sizes", lambda s, n: (n[0], n[1] - 1)),
    ),
    "row written twice": ("llava", 0, {}, _shift(DynamicLayer, "update", _written_twice)),
    "static row counted twice": (
        "qwen2_vl", 0, STATIC, _shift(StaticLayer, "update", _counted_twice),
    ),
    "crop of all layers but one": ("llava", 2, {}, _last_layer_stays),
}  # fmt: skip
if hasattr(Cache, "get_query_offset"):
    FAULTS["offset of queries in rows"] = (
        "qwen2_vl", 0, {}, _shift(Cache, "get_query_offset", _rows),
    )  # fmt: skip
if COUNTS:
    FAULTS["counter after a crop"] = ("qwen3_5", 2, {}, _nothing(STATES, "crop"))
    FAULTS["counter of a step"] = ("lfm2_vl", 0, {}, _shift(STATES, "update_conv_state", _missed))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_raise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, crop, options, install = FAULTS[name]
    install(monkeypatch)
    with pytest.raises(CacheError, match=cache_utils.__name__.split(".")[0]):
        conversation({**FAMILIES, **HYBRID}[family], crop, **options)
