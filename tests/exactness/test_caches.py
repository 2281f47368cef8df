"""Static and offloaded caches, and prompts that the decoder takes in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.caches import ENTRY, LAYERS, quantized_cache, static_cache
from support.families import CORE, FAMILIES, Family, text
from support.family.hybrid import HYBRID
from support.family.structural import STRUCTURAL
from support.prompts import ragged, single
from transformers import DynamicCache

import tokencomp
from tokencomp.errors import PrefillWarning, UnsupportedCacheError

FAMILY_NAMES = CORE
CHUNK = 7


# -- static ----------------------------------------------------------------------------------------


@pytest.mark.thin(2)
def test_static_equals_masked(family: Family, backend: str) -> None:
    """Against the unpatched, uncached run with masked columns, and the dynamic cache."""
    model, inputs = family.build(backend), ragged(family)
    static = {"cache_implementation": "static"}
    _, out, masks = oracle.generated(model, family, inputs, call=static, plan=ENTRY)
    with tokencomp.patch(model, plan=ENTRY):
        assert oracle.close(out, oracle.generate(model, inputs))
        beams = [oracle.generate(model, inputs, num_beams=3, **how) for how in (static, {})]
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "compact", "reducer": "uniform"},
        {"merge": True, "reducer": "kcenter"},
        {"reducer": "bipartite"},
    ],
    ids=str,
)
def test_static_with_options(options: dict[str, Any]) -> None:
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), ragged(family)
    with tokencomp.patch(model, 0.5, **options):
        static = oracle.generate(model, inputs, cache_implementation="static")
        assert oracle.close(static, oracle.generate(model, inputs))


def test_a_reset_static_cache_is_a_plain_one() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    batch = family.batch([[text(3), family.image(1), text(4)]] * 3)
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        cache = static_cache(model, 128)
        model(**ragged(family), past_key_values=cache, use_cache=True)
        cache.reset()
        again = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]
        fresh = model(**batch, use_cache=True).logits[:, -1]
    assert oracle.difference(again, fresh) < 1e-5


def test_static_second_turns(family: Family) -> None:
    """On one cache: an image, then padded text, then another image, then one token."""
    model = family.build()
    a, b = family.image(0), family.image(1)
    turns = [
        [[text(3), a, text(5, 3)], [text(2), b, text(3, 4)]],
        [[text(4, 9)], [text(2, 8)]],
        [[text(2, 5), b, text(2)], [text(3, 5), a, text(2, 6)]],
        [[text(1, 3)], [text(1, 4)]],
    ]
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
        # Each sample alone, without padding, at the positions that it has in the batch.
        alone = torch.empty_like(results[0])
        for b in range(2):
            cache, start = DynamicCache(), 0
            for number, turn in enumerate(turns):
                call, batch = family.batch([turn[b]]), family.batch(turn)
                n = call["input_ids"].shape[1]
                positions = family.positions(model, batch)[..., b : b + 1, -n:]
                call["position_ids"] = positions + start
                del call["attention_mask"]
                start += batch["input_ids"].shape[1]
                out = model(**call, past_key_values=cache, use_cache=True, logits_to_keep=1)
                alone[number, b] = out.logits[0, -1]
    assert max(oracle.difference(alone, found) for found in results) < 1e-5


def test_a_static_cache_of_what_is_left_is_long_enough(family: Family) -> None:
    model, inputs = family.build(), single(family)
    unmasked = {
        k: v for k, v in inputs.items() if k != "attention_mask"
    }  # one of generate is longer
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        dynamic = model(**unmasked, use_cache=True).logits[:, -1]
        kept = int(oracle.kept_columns(handle, inputs, 1)[0].sum())
        cache = static_cache(model, kept)
        static = model(**unmasked, past_key_values=cache, use_cache=True).logits[:, -1]
    assert kept < inputs["input_ids"].shape[1]
    assert oracle.difference(static, dynamic) < 1e-5


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
        assert oracle.difference(run(seen), run(inputs["attention_mask"])) < 1e-5
        calls.clear()
        with pytest.raises(UnsupportedCacheError, match="2-D attention_mask"):
            run(hidden)
    assert not calls


# -- offloaded, refused ----------------------------------------------------------------------------


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
@pytest.mark.parametrize("plan", [ENTRY, plans.make(plans.MERGED, 4)], ids=["entry", "merged"])
def test_offloaded(family: Family, plan: Any, kind: str, offloaded: Any) -> None:
    model, inputs = family.build(), ragged(family)
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config) if kind == "dynamic" else static_cache(model, 192)
    with tokencomp.patch(model, plan=plan):
        expected = oracle.generate(model, inputs)
        out = oracle.generate(model, inputs, past_key_values=offloaded(cache))
    assert oracle.close(out, expected)


@pytest.mark.parametrize("name", [n for n in ("gemma3", "gemma4") if n in HYBRID])
def test_static_caches_with_a_window_are_refused(name: str) -> None:
    family = HYBRID[name]
    model, inputs = family.build(), single(family)
    windows = pytest.raises(UnsupportedCacheError, match="holds StaticSlidingWindowLayer")
    with tokencomp.patch(model, plan=ENTRY), windows:
        oracle.generate(model, inputs, 2, cache_implementation="static")


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


# -- prefill in chunks -----------------------------------------------------------------------------


def chunking(family: Family) -> Any:
    """A model that can take prompts with media in chunks."""
    model = family.build()
    if not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("this transformers cannot chunk prompts with media, patched or not")
    return model


def widths(model: Any, family: Family) -> list[int]:
    """Filled with the columns that every decoder layer sees in every call."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    for layer in family.decoder(model).layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    return seen


ONE_PASS = (
    "gemma3",
    "gemma4",
    "gemma4_e",
    "inkling_mm_model",
)  # masks of windows or blocks are of the whole prompt
CHUNKED = [
    n if n in FAMILIES else pytest.param(n, marks=pytest.mark.long)
    for n in sorted({*FAMILIES, *HYBRID, *STRUCTURAL} - {*ONE_PASS})
]


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", ["greedy", "static", "beams", "media"])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_equal_one_pass(name: str, way: str) -> None:
    """The decoder takes what is left in chunks; a chunk as wide as the prompt is one pass."""
    family = {**FAMILIES, **HYBRID, **STRUCTURAL}[name]
    model, inputs = chunking(family), ragged(family)
    if way == "media":  # at the end of the prompt
        inputs = family.batch([[text(5), family.image(0)], [text(12, 5), family.image(1)]])
    seen = widths(model, family)
    options: dict[str, Any] = {"num_beams": 2} if way == "beams" else {}
    static = {"cache_implementation": "static"} if way == "static" else {}
    with tokencomp.patch(model, plan=ENTRY) as handle:
        whole = oracle.generate(model, inputs, prefill_chunk_size=500, **options)
        assert max(seen) > 2 * CHUNK and handle.stats.prefill_chunk is None
        seen.clear()
        chunked = oracle.generate(model, inputs, prefill_chunk_size=CHUNK, **options, **static)
        assert max(seen) == CHUNK == handle.stats.prefill_chunk
        dynamic = way in ("greedy", "media")
        masks = oracle.kept_columns(handle, inputs, family.layers) if dynamic else []
    assert oracle.close(chunked, whole)
    if masks:
        assert oracle.deviation(model, family, inputs, chunked, masks) < 5e-5


def test_a_later_image_in_chunks(family: Family) -> None:
    """Onto a cache that already holds a compressed prompt."""
    if family.mrope:
        pytest.skip("generate gives a later image on a reused cache no grid of positions")
    model = chunking(family)
    images = family.image(0), family.image(1)
    first = family.batch([[text(3), images[0], text(5, 3)], [text(2), images[1], text(3, 4)]])
    turn = family.batch([[text(2), images[1], text(4, 8)], [text(5), images[0], text(2, 6)]])
    results = []
    with tokencomp.patch(model, plan=ENTRY) as handle:
        for options in ({}, {"prefill_chunk_size": CHUNK}):
            cache = oracle.cache_of(oracle.generate(model, first, 5))
            ones = torch.ones(2, 4, dtype=torch.long)  # of the answer
            mask = torch.cat([first["attention_mask"], ones, turn["attention_mask"]], 1)
            call = {**turn, "attention_mask": mask, "past_key_values": cache}
            results.append(oracle.generate(model, call, 6, **options))
        assert handle.stats.prefill_chunk == CHUNK and handle.stats.past > 0
    assert oracle.close(*results)


@pytest.mark.parametrize(
    ("name", "why"),
    [("qwen2_vl", "layers"), ("internvl", "output_hidden_states"), ("gemma3", "a window")],
)
def test_what_needs_one_pass_says_so(name: str, why: str) -> None:
    family = {**FAMILIES, **HYBRID}[name]
    model, inputs = chunking(family), ragged(family)
    plan = LAYERS if why == "layers" else ENTRY
    options = {why: True} if why == "output_hidden_states" else {}
    with tokencomp.patch(model, plan=plan) as handle:
        whole = oracle.generate(model, inputs, **options)
        with pytest.warns(PrefillWarning, match="one pass"):
            out = oracle.generate(model, inputs, prefill_chunk_size=CHUNK, **options)
        assert handle.stats.prefill_chunk is None
    assert oracle.close(out, whole, 1e-30)


def test_the_cache_of_stats_is_the_cache_of_the_call() -> None:
    """Bytes with and without a patch are those of the tensors; without a cache none are named."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build("sdpa"), single(family)

    def stored() -> int:
        layers = model(**inputs, use_cache=True).past_key_values.layers
        return sum(t.numel() * t.element_size() for x in layers for t in (x.keys, x.values))

    full = stored()
    with tokencomp.patch(model, ratio=0.5, reducer="kcenter") as handle:
        counted = f"cache {100 * stored() / full:.0f} %"
        stats = handle.stats
        assert counted in str(stats) and stats.kv_bytes_before == full
        model(**inputs, use_cache=False)
        assert "cache" not in str(handle.stats)
