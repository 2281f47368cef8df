"""`prefill_chunk_size` for prompts with media: the decoder takes what is left in chunks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import oracle
from support.caches import ENTRY, LAYERS, ragged, static_cache
from support.families import CORE, FAMILIES, Family, text

import tokencomp
from tokencomp.errors import PrefillWarning

FAMILY_NAMES = CORE

CHUNK = 7


@pytest.fixture
def model(family: Family, backend: str) -> Any:
    model = family.build(backend)
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


def compare(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences)
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.thin(3)
@pytest.mark.parametrize("way", ["greedy", "static", "beams"])
def test_chunked_equals_one_pass(family: Family, model: Any, way: str) -> None:
    inputs, seen = ragged(family), widths(model, family)
    options = {"num_beams": 2} if way == "beams" else {}
    static = {"cache_implementation": "static"} if way == "static" else {}
    with tokencomp.patch(model, plan=ENTRY) as handle:
        whole = oracle.generate(model, inputs, **options)
        assert max(seen) > 2 * CHUNK and handle.stats.prefill_chunk is None
        seen.clear()
        chunked = oracle.generate(model, inputs, prefill_chunk_size=CHUNK, **options, **static)
        assert max(seen) == CHUNK == handle.stats.prefill_chunk
    compare(chunked, whole)
    if way == "greedy":
        masks = oracle.kept_columns(handle, inputs, family.layers)
        new = chunked.sequences[:, -8:-1]
        expected = oracle.masked_logits(model, family, inputs, masks, new)[:, -8:]
        assert (torch.stack(chunked.logits, 1) - expected).abs().max() < 1e-5


@pytest.mark.thin(2)
def test_a_chunk_as_wide_as_the_prompt_is_one_pass(family: Family, model: Any) -> None:
    inputs = ragged(family)
    with tokencomp.patch(model, plan=ENTRY) as handle:
        whole = oracle.generate(model, inputs)
        wide = oracle.generate(model, inputs, prefill_chunk_size=500)
        assert handle.stats.prefill_chunk is None
    assert torch.equal(torch.stack(wide.logits), torch.stack(whole.logits))


def test_a_later_image_in_chunks(family: Family, model: Any) -> None:
    """Onto a cache that already holds a compressed prompt."""
    if family.mrope:
        pytest.skip("generate gives a later image on a reused cache no grid of positions")
    first = family.batch([[text(3), family.image(0), text(5, 3)]])
    turn = family.batch([[text(2), family.image(1), text(4, 8)]])
    results = []
    with tokencomp.patch(model, plan=ENTRY) as handle:
        for options in ({}, {"prefill_chunk_size": CHUNK}):
            cache = oracle.cache_of(oracle.generate(model, first, 5))
            ones = torch.ones(1, int(cache.get_seq_length()), dtype=torch.long)
            mask = torch.cat([ones, turn["attention_mask"]], 1)
            call = {**turn, "attention_mask": mask, "past_key_values": cache}
            results.append(oracle.generate(model, call, 6, **options))
        assert handle.stats.prefill_chunk == CHUNK and handle.stats.past > 0
    compare(*results)


@pytest.mark.thin(2)
@pytest.mark.parametrize("why", ["layers", "output_hidden_states"])
def test_what_needs_one_pass_says_so(family: Family, model: Any, why: str) -> None:
    inputs = ragged(family)
    plan = LAYERS if why == "layers" else ENTRY
    options = {"output_hidden_states": True} if why != "layers" else {}
    with tokencomp.patch(model, plan=plan) as handle:
        whole = oracle.generate(model, inputs, **options)
        with pytest.warns(PrefillWarning, match="one pass"):
            out = oracle.generate(model, inputs, prefill_chunk_size=CHUNK, **options)
        assert handle.stats.prefill_chunk is None
    assert torch.equal(torch.stack(out.logits), torch.stack(whole.logits))


@pytest.mark.thin(2)
def test_ratio_zero_is_chunked_by_transformers(family: Family, model: Any) -> None:
    inputs, seen = ragged(family), widths(model, family)
    plain = oracle.generate(model, inputs, prefill_chunk_size=CHUNK)
    expected = list(seen)
    for ratio, off in ((0.0, False), (0.5, True)):
        with tokencomp.patch(model, ratio, reducer="uniform") as handle:
            seen.clear()
            with handle.disabled() if off else warnings.catch_warnings():
                out = oracle.generate(model, inputs, prefill_chunk_size=CHUNK)
        assert seen == expected and not handle.stats
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


def test_text_on_a_compressed_static_cache_in_chunks() -> None:
    """The chunks of a later, padded text turn."""
    family = FAMILIES["llava_onevision"]
    model = family.build()
    first = family.batch([[text(3), family.image(0), text(5, 3)], [text(4), family.image(1)]])
    more = family.batch([[text(9, 5)], [text(4, 6)]])
    mask = torch.cat([first["attention_mask"], more["attention_mask"]], 1)
    start, results = first["input_ids"].shape[1], []
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        for size in (9, 4):
            cache = static_cache(model, 160)
            model(**first, past_key_values=cache, use_cache=True)
            for at in range(0, 9, size):
                ids = more["input_ids"][:, at : at + size]
                stop = start + at + ids.shape[1]
                out = model(
                    input_ids=ids,
                    attention_mask=mask[:, :stop],
                    position_ids=torch.arange(start + at, stop)[None].expand(2, -1),
                    past_key_values=cache,
                    use_cache=True,
                )
            results.append(out.logits[:, -1])
    assert (results[0] - results[1]).abs().max() < 1e-5
