"""Caches other than the default one: static and offloaded; for others see test_quantized_caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import oracle
from support.caches import ENTRY, LAYERS, quantized_cache, ragged, single, static_cache
from support.families import CORE, FAMILIES, Family, text
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

import tokencomp
from tokencomp.engine.cache_special import CompressedStaticLayer
from tokencomp.errors import UnsupportedCacheError

FAMILY_NAMES = CORE


def close(a: Any, b: Any) -> bool:
    return all((x - y).abs().max() < 1e-5 for x, y in zip(a.logits, b.logits, strict=True))


# -- static ----------------------------------------------------------------------------------------


@pytest.mark.thin(2)
def test_static_equals_masked(family: Family, backend: str) -> None:
    """Against the unpatched, uncached run with masked columns, and the dynamic cache."""
    model, inputs = family.build(backend), ragged(family)
    with tokencomp.patch(model, plan=ENTRY) as handle:
        dynamic = oracle.generate(model, inputs)
        static = oracle.generate(model, inputs, cache_implementation="static")
        masks = oracle.kept_columns(handle, inputs, family.layers)
    assert torch.equal(static.sequences, dynamic.sequences) and close(static, dynamic)
    layers = oracle.cache_of(static).layers
    assert all(type(layer) is CompressedStaticLayer for layer in layers)
    new = static.sequences[:, -8:-1]
    expected = oracle.masked_logits(model, family, inputs, masks, new)[:, -8:]
    assert (torch.stack(static.logits, 1) - expected).abs().max() < 1e-5


def test_static_at_ratio_zero_is_untouched(family: Family) -> None:
    model, inputs = family.build(), ragged(family)
    expected = oracle.generate(model, inputs, cache_implementation="static")
    with tokencomp.patch(model, 0.0):
        out = oracle.generate(model, inputs, cache_implementation="static")
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert all(type(layer) is StaticLayer for layer in oracle.cache_of(out).layers)


def test_static_beams(family: Family) -> None:
    model, inputs = family.build(), ragged(family)
    with tokencomp.patch(model, plan=ENTRY):
        static = oracle.generate(model, inputs, num_beams=3, cache_implementation="static")
        dynamic = oracle.generate(model, inputs, num_beams=3)
    assert torch.equal(static.sequences, dynamic.sequences)


@pytest.mark.parametrize("option", ["compact", "merge"])
def test_static_with_options(option: str) -> None:
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), ragged(family)
    options: dict[str, Any] = {"positions": "compact", "reducer": "uniform"}
    if option == "merge":
        options = {"merge": True, "reducer": "kcenter"}
    with tokencomp.patch(model, 0.5, **options):
        static = oracle.generate(model, inputs, cache_implementation="static")
        dynamic = oracle.generate(model, inputs)
    assert torch.equal(static.sequences, dynamic.sequences) and close(static, dynamic)


def test_static_second_turns(family: Family) -> None:
    """On one cache: an image, then padded text, then another image, then one token."""
    model = family.build()
    a, b = family.image(0), family.image(1)
    rows = [[[text(3), a, text(5, 3)], [text(2), b, text(3, 4)]]]
    turns = [[[text(4, 9)], [text(2, 8)]], [[text(2, 5), b, text(2)], [text(3, 5), a, text(2, 6)]]]
    turns = [*rows, *turns, [[text(1, 3)], [text(1, 4)]]]
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        results = []
        for cache in (DynamicCache(), static_cache(model, 192)):
            mask, start, logits = torch.zeros(2, 0, dtype=torch.long), 0, []
            for turn in turns:
                call = family.batch(turn)
                mask = torch.cat([mask, call["attention_mask"]], 1)
                positions = family.positions(model, call) + start
                start += call["input_ids"].shape[1]
                call |= {"attention_mask": mask, "position_ids": positions}
                out = model(**call, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits.append(out.logits[:, -1])
            results.append(torch.stack(logits))
            assert int(cache.get_seq_length()) == start
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_a_static_cache_of_what_is_left_is_long_enough(family: Family) -> None:
    model, inputs = family.build(), single(family)
    inputs.pop("attention_mask")  # a mask prepared for fewer columns than the prompt is refused
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        dynamic = model(**inputs, use_cache=True).logits[:, -1]
        kept = sum(sum(row) for row in handle.stats._lengths_after()) // family.layers
        cache = static_cache(model, kept)
        static = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
    assert kept < inputs["input_ids"].shape[1]
    assert (static - dynamic).abs().max() < 1e-5


def test_a_reset_static_cache_is_a_plain_one() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    cache = static_cache(model, 128)
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        model(**ragged(family), past_key_values=cache, use_cache=True)
        memory = [layer.keys.data_ptr() for layer in cache.layers]
        cache.reset()
        assert all(type(layer) is StaticLayer for layer in cache.layers)
        batch = family.batch([[text(3), family.image(1), text(4)]] * 3)
        again = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]
        assert memory == [layer.keys.data_ptr() for layer in cache.layers]
        fresh = model(**batch, use_cache=True).logits[:, -1]
    assert (again - fresh).abs().max() < 1e-5


def test_prepared_masks(family: Family, backend: str) -> None:
    """A 4-D mask of left padding is read; one that hides more is refused before any layer runs."""
    model, inputs = family.build(backend), ragged(family)
    positions = family.positions(model, inputs)
    real = inputs["attention_mask"].bool()
    seen = real[:, None, None] & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    hidden = seen.clone()
    hidden[0, :, -1, -3] = False
    calls: list[int] = []
    family.decoder(model).layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def run(mask: torch.Tensor) -> torch.Tensor:
        if mask.ndim == 4 and backend == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits[:, -1]

    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        assert (run(seen) - run(inputs["attention_mask"])).abs().max() < 1e-5
        calls.clear()
        with pytest.raises(UnsupportedCacheError, match="2-D attention_mask"):
            run(hidden)
    assert not calls


# -- offloaded -------------------------------------------------------------------------------------


class Stream:
    """Stands in for a CUDA stream."""

    def wait_stream(self, other: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a cache an offloaded one, on a machine without an accelerator."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    def make(cache: Any) -> Any:
        cache.offloading = cache.only_non_sliding = True
        cache.prefetch_stream = Stream()
        return cache

    return make


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_offloaded(family: Family, kind: str, offloaded: Any) -> None:
    model, inputs = family.build(), ragged(family)
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config) if kind == "dynamic" else static_cache(model, 192)
    with tokencomp.patch(model, plan=ENTRY):
        expected = oracle.generate(model, inputs)
        out = oracle.generate(model, inputs, past_key_values=offloaded(cache))
    assert torch.equal(out.sequences, expected.sequences) and close(out, expected)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_layer_plans_are_refused(family: Family, kind: str, offloaded: Any) -> None:
    """At the first prompt, before a layer runs; text passes."""
    model, inputs, calls = family.build(), single(family), []
    if kind == "quantized":
        cache: Any = quantized_cache("fp8", model)
    else:
        cache = static_cache(model, 128) if kind == "static" else offloaded(DynamicCache())
    family.decoder(model).layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with tokencomp.patch(model, plan=LAYERS), torch.no_grad():
        with pytest.raises(UnsupportedCacheError, match="entry stage alone"):
            model(**inputs, past_key_values=cache, use_cache=True)
        assert not calls
        text_only = family.batch([[text(6)]])
        model(**text_only, past_key_values=cache, use_cache=True)
    assert len(calls) == 1


# -- what decoding costs ---------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of the operations that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_decoded_token_costs_no_operation_more(family: Family, kind: str) -> None:
    """Operations of one step after an entry plan: those of the unpatched model, or fewer."""
    model, inputs = family.build(), single(family)
    n = inputs["input_ids"].shape[1]
    last = family.positions(model, inputs).max() + 1
    step = {"input_ids": torch.tensor([[5]])}
    step["position_ids"] = last.expand(3, 1, 1) if family.mrope else last.expand(1, 1)
    counts = []
    for plan in (tokencomp.Plan(), ENTRY):
        cache = DynamicCache() if kind == "dynamic" else static_cache(model, n + 8)
        with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
            if plan is not ENTRY:
                handle.remove()
            model(**inputs, past_key_values=cache, use_cache=True)
            with Operations() as ran:
                model(**step, past_key_values=cache, use_cache=True)
            counts.append(ran.names)
            layers = family.decoder(model).layers
            assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    extra = 1 if kind == "static" else 0  # the logical length: rows written + left out
    assert len(counts[1]) <= len(counts[0]) + extra
    reads = [names.count("aten._local_scalar_dense.default") for names in counts]
    assert reads[1] <= reads[0]
