"""Every way to generate gives what the plainest way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans, turns
from support.families import FAMILIES, NO_EOS, Family, text
from support.family.base import IMAGE, VIDEO
from support.family.hybrid import HYBRID
from support.family.structural import STRUCTURAL
from transformers import TextIteratorStreamer

import tokencomp
from tokencomp.engine.cache import CompressedLayer

LONG_FAMILIES = sorted({**STRUCTURAL, **HYBRID})
FAMILY_NAMES = [*sorted(FAMILIES), *LONG_FAMILIES]
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def rows(family: Family) -> list[list]:
    torch.manual_seed(7)
    return [
        [text(3), family.image(0), text(9, 3)],
        [family.video(4), text(3, 4), family.image(1), text(5, 5)],
        [text(11, 6)],
    ]


@pytest.mark.thin(2)
def test_ratio_zero_changes_nothing(family: Family, backend: str) -> None:
    model, inputs = family.build(backend), family.batch(rows(family))
    with torch.no_grad():
        expected = model(**inputs).logits
        sequences = oracle.generate(model, inputs).sequences
        with tokencomp.patch(model, 0.0):
            assert torch.equal(model(**inputs).logits, expected)
            out = oracle.generate(model, inputs)
    assert torch.equal(out.sequences, sequences)
    assert not any(isinstance(layer, CompressedLayer) for layer in oracle.cache_of(out).layers)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.NAMES)
def test_batch_equals_singles(family: Family, name: str) -> None:
    plans.skip_refused(family, name)
    model, data = family.build(), rows(family)
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        batch = oracle.generate(model, family.batch(data))
        singles = [oracle.generate(model, family.batch([row])) for row in data]
    for b, single in enumerate(singles):
        for step in range(8):
            assert (batch.logits[step][b] - single.logits[step][0]).abs().max() < 1e-4
        assert torch.equal(batch.sequences[b, -8:], single.sequences[0, -8:])


@pytest.mark.thin(2)
def test_text_only_passes_through(family: Family, backend: str) -> None:
    model, inputs = family.build(backend), family.batch([[text(9)], [text(6, 2)]])
    expected = oracle.generate(model, inputs)
    with tokencomp.patch(model, 0.9, reducer="aim" if family.name in FAMILIES else "uniform"):
        out = oracle.generate(model, inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert not any(isinstance(layer, CompressedLayer) for layer in oracle.cache_of(out).layers)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["entry", "both", "attention"])
def test_beams(family: Family, name: str) -> None:
    plans.skip_refused(family, name)
    model, data = family.build(), rows(family)
    options = dict(num_beams=3, num_return_sequences=2)
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        batch = oracle.generate(model, family.batch(data), **options)
        for b, row in enumerate(data):
            single = oracle.generate(model, family.batch([row]), **options)
            assert torch.equal(batch.sequences[2 * b : 2 * b + 2, -8:], single.sequences[:, -8:])


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.DISTINCT)
def test_prompt_lookup_equals_greedy(family: Family, name: str) -> None:
    plans.skip_refused(family, name)
    model = family.build()
    if getattr(model, "_is_stateful", False):  # Qwen3.5
        pytest.skip("transformers has no assisted decoding for models that keep a state")
    repeats = text(4, 3) * 3
    inputs = family.batch([[text(3), family.image(0), repeats]])
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        # the penalty keeps a random model from repeating itself, so that drafts get rejected
        options = dict(max_new_tokens=24, repetition_penalty=1.5, suppress_tokens=[NO_EOS])
        greedy = model.generate(**inputs, **options)
        lookup = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
        assisted = model.generate(**inputs, **options, **lookup)
    n = min(greedy.shape[1], assisted.shape[1])  # some releases add one token more when assisted
    assert n >= inputs["input_ids"].shape[1] + 24
    assert torch.equal(greedy[:, :n], assisted[:, :n])


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.QUESTION_FREE)
def test_second_turn_on_reused_cache(family: Family, name: str) -> None:
    plans.skip_refused(family, name)
    model = family.build()
    turn1 = family.batch([[text(3), family.image(0), text(5, 3)]])
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        # A placeholder in the answer would stand for media that the next prompt does not have.
        first = oracle.generate(model, turn1, 5, suppress_tokens=[IMAGE, VIDEO])
        cache = oracle.cache_of(first)
        ids = torch.cat([first.sequences, torch.tensor([text(4, 8)])], 1)
        after = {**turn1, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        after = family.finish(after)
        rest = {k: v for k, v in after.items() if k in TEXT}
        second = oracle.generate(model, rest, 6, past_key_values=cache)
        whole = oracle.generate(model, after, 6)
    assert torch.equal(second.sequences, whole.sequences)
    for a, b in zip(second.logits, whole.logits, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", plans.QUESTION_FREE)
def test_second_image_on_reused_cache(family: Family, name: str) -> None:
    """Turn 2 brings its own image: it is compressed on top of a compressed cache."""
    plans.skip_refused(family, name)
    if family.name in HYBRID:
        pytest.skip("test_layer_types.py has it")
    plan = plans.make(name, family.layers)
    assert turns.image_in_second_turn(family, family.build(), plan) < 1e-5


def _chunks_visual_prompts(model: torch.nn.Module) -> bool:
    return hasattr(model, "_expand_multimodal_outputs")  # transformers that pre-encode media


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.DISTINCT)
def test_chunked_prefill(family: Family, name: str) -> None:
    plans.skip_refused(family, name)
    model, inputs = family.build(), family.batch(rows(family)[:2])
    if not _chunks_visual_prompts(model):
        pytest.skip("this transformers cannot chunk prompts with media, patched or not")
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        whole = oracle.generate(model, inputs)
        chunked = oracle.generate(model, inputs, prefill_chunk_size=7)
    assert torch.equal(whole.sequences, chunked.sequences)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["entry", "both"])
def test_chunked_second_turn(family: Family, name: str) -> None:
    """Several tokens at once on a compressed, ragged cache."""
    plans.skip_refused(family, name)
    if family.name in HYBRID:
        pytest.skip("test_layer_types.py has it")
    model, inputs = family.build(), family.batch(rows(family))
    extra = torch.tensor([text(5, 20 + b) for b in range(3)])
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        positions = family.positions(model, inputs)
        out = model(**inputs, position_ids=positions, use_cache=True)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        last = positions.max(0).values.max(-1).values if positions.ndim == 3 else positions[:, -1]
        more = last[:, None] + torch.arange(1, 6)
        more = more.expand(3, -1, -1) if family.mrope else more
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1)
        logits = model(
            input_ids=extra,
            attention_mask=mask,
            position_ids=more,
            past_key_values=oracle.cache_of(out),
            use_cache=True,
        ).logits
    expected = oracle.masked_logits(model, family, inputs, masks, extra)[:, -5:]
    assert (logits - expected).abs().max() < 1e-5


def test_no_cache(family: Family) -> None:
    model, inputs = family.build(), family.batch(rows(family)[:1])
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        cached = oracle.generate(model, inputs)
        bare = oracle.generate(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, bare.sequences)


def test_streaming(family: Family) -> None:
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    model, inputs = family.build(), family.batch(rows(family)[:1])
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=10)
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        out = model.generate(**inputs, max_new_tokens=6)
        model.generate(**inputs, max_new_tokens=6, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer).split() == [str(int(i)) for i in new]


def test_sampled_sequences(family: Family) -> None:
    """num_return_sequences draws from the compressed model's distribution, row by row."""
    model, inputs = family.build(), family.batch(rows(family)[:1])
    options = dict(do_sample=True, num_return_sequences=3, temperature=1.5)
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        torch.manual_seed(3)
        many = oracle.generate(model, inputs, 4, **options)
        greedy = oracle.generate(model, inputs, 1)
    assert many.sequences.shape[0] == 3
    for b in range(3):
        assert (many.logits[0][b] - greedy.logits[0][0]).abs().max() < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", plans.DISTINCT)
def test_kv_bytes(family: Family, name: str) -> None:
    """An unpadded cache holds the kept tokens of every layer, to the byte."""
    plans.skip_refused(family, name)
    if family.name in HYBRID or family.name == "kimi_k25":
        pytest.skip("keys and values of its layers have several sizes, see test_layer_types.py")
    model, data = family.build(), rows(family)[1]
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        out = model(**family.batch([data]), use_cache=True)
        stats = handle.stats
        masks = oracle.kept_columns(handle, family.batch([data]), family.layers)
    held = sum(
        t.numel() * t.element_size()
        for layer in oracle.cache_of(out).layers
        for t in (layer.keys, layer.values)
    )
    config = family.decoder(model).config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * head_dim * 4
    assert held == sum(int(m.sum()) for m in masks) * per_token
    assert held == stats.kv_bytes_after < stats.kv_bytes_before


@pytest.mark.parametrize(
    "reducer", [pytest.param(plans.RELEVANT, id="condiv"), "prune", "fastv", "cdpruner"]
)
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_logits_of_visual_columns(name: str, reducer: Any) -> None:
    """More logits than text after the image: those of the whole prompt, and no drafts."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(5, 3)]])
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle, torch.no_grad():
        whole = model(**inputs, logits_to_keep=0).logits
        tail = whole.shape[1] - handle.stats.spans[0][-1].stop
        for k in (tail + 2, tail + 3, whole.shape[1] - 1):
            got = model(**inputs, logits_to_keep=k).logits
            assert torch.equal(got[:, -k:], whole[:, -k:])


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_flops_of_a_second_turn(name: str) -> None:
    """Counted from weights, and from every (query, key) pair of every layer."""
    family = FAMILIES[name]
    model = family.build()
    first = family.batch([[text(3), family.image(0), text(5, 3)]])
    second = family.batch([[text(2, 9), family.image(1), text(4, 8)]])
    masks = [first["attention_mask"], second["attention_mask"]]
    turn = {**second, "attention_mask": torch.cat(masks, 1)}
    positions = family.positions(model, second) + first["input_ids"].shape[1]
    rows = []
    with tokencomp.patch(model, plan=plans.make("both", family.layers)) as handle:
        out = model(**first, use_cache=True)
        rows.append([int(m.sum()) for m in oracle.kept_columns(handle, first, family.layers)])
        cache = oracle.cache_of(out)
        model(**turn, position_ids=positions, past_key_values=cache, use_cache=True)
        rows.append([int(m.sum()) for m in oracle.kept_columns(handle, second, family.layers)])
        stats = handle.stats
    layer = family.decoder(model).layers[0]
    weights = sum(p.numel() for n, p in layer.named_parameters() if n.endswith("proj.weight"))
    width = layer.self_attn.q_proj.weight.shape[0]

    def count(pasts: list[int], news: list[int]) -> int:
        pairs = sum(p + i + 1 for p, n in zip(pasts, news, strict=True) for i in range(n))
        return 2 * weights * sum(news) + 4 * width * pairs

    assert rows[0][0] > rows[0][1]
    assert stats.flops_after == count(*rows)
    full = [[t["input_ids"].shape[1]] * family.layers for t in (first, second)]
    assert stats.flops_before == count(*full)
