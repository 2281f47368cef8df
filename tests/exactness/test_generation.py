"""Every way to generate gives what the plainest way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.caches import ENTRY
from support.families import FAMILIES, NO_EOS, Family, text
from support.family.hybrid import HYBRID
from support.family.structural import STRUCTURAL
from support.prompts import ragged, rows, single
from transformers import GenerationConfig, TextIteratorStreamer

import tokencomp
from tokencomp.errors import NoVisualInputError, UnsupportedCacheError

LONG_FAMILIES = sorted({**STRUCTURAL, **HYBRID})
FAMILY_NAMES = [*sorted(FAMILIES), *LONG_FAMILIES]
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@pytest.mark.thin(2)
def test_ratio_zero_and_text_change_nothing(family: Family, backend: str) -> None:
    """Bit by bit, in prefill and decoding; prompts of text at any ratio."""
    model, words = family.build(backend), family.batch([[text(9)], [text(6, 2)]])
    aim = "aim" if family.name in FAMILIES else "uniform"
    for inputs, setting in (
        (ragged(family), {"ratio": 0}),
        (words, {"ratio": 0.9, "reducer": aim}),
    ):
        with torch.no_grad():
            expected, plain = model(**inputs).logits, oracle.generate(model, inputs)
            with tokencomp.patch(model, **setting):
                assert torch.equal(model(**inputs).logits, expected)
                out = oracle.generate(model, inputs)
        assert oracle.close(out, plain, 1e-30)
        layers = [oracle.cache_of(made).layers for made in (out, plain)]
        assert [type(layer) for layer in layers[0]] == [type(layer) for layer in layers[1]]


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", [*plans.NAMES, plans.MERGED])
def test_batch_equals_singles(family: Family, name: str) -> None:
    """Greedily, and the beams of two sequences."""
    plans.skip_refused(family, name)
    model, data = family.build(), rows(family)
    options = dict(num_beams=3, num_return_sequences=2)
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        batch = oracle.generate(model, family.batch(data))
        beams = oracle.generate(model, family.batch(data), 4, **options).sequences
        for b, row in enumerate(data):
            inputs = family.batch([row])
            single = oracle.generate(model, inputs)
            for mine, alone in zip(batch.logits, single.logits, strict=True):
                assert oracle.difference(mine[b], alone[0]) < 1e-4
            assert torch.equal(batch.sequences[b, -8:], single.sequences[0, -8:])
            lone = oracle.generate(model, inputs, 4, **options).sequences
            assert torch.equal(beams[2 * b : 2 * b + 2, -4:], lone[:, -4:])


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", [*plans.DISTINCT, plans.MERGED])
def test_prompt_lookup_equals_greedy(family: Family, name: str) -> None:
    """Rejected drafts crop the cache."""
    plans.skip_refused(family, name)
    model = family.build()
    if getattr(model, "_is_stateful", False):  # Qwen3.5
        pytest.skip("transformers has no assisted decoding for models that keep a state")
    inputs = family.batch([[text(3), family.image(0), text(4, 3) * 3]])
    # the penalty keeps a random model from repeating itself, so that drafts get rejected
    options = dict(max_new_tokens=24, repetition_penalty=1.5, suppress_tokens=[NO_EOS])
    lookup = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1)

    def answers() -> list[torch.Tensor]:
        both = [model.generate(**inputs, **options, **how) for how in ({}, lookup)]
        n = min(ids.shape[1] for ids in both)  # some releases add one token more when assisted
        assert n >= inputs["input_ids"].shape[1] + 24
        return [ids[:, :n] for ids in both]

    if family.name in HYBRID and not torch.equal(*answers()):
        pytest.skip("transformers' drafts change the answer without a patch, too")
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        assert torch.equal(*answers())


@pytest.mark.parametrize("name", ["both", plans.MERGED])
@pytest.mark.parametrize("of", ["qwen2_vl", "llava_onevision"])
def test_a_second_model_as_assistant(of: str, name: str) -> None:
    """It drafts from the text alone; the tokens are those of the patched model."""
    family = FAMILIES[of]
    model, assistant = family.build(), family.build(seed=1)
    inputs = family.batch([[text(3), family.image(0), text(4, 3) * 3]])
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        options = dict(max_new_tokens=12, suppress_tokens=[NO_EOS])
        greedy = model.generate(**inputs, **options)
        assisted = model.generate(**inputs, **options, assistant_model=assistant)
    n = min(greedy.shape[1], assisted.shape[1])
    assert n >= inputs["input_ids"].shape[1] + 12
    assert torch.equal(greedy[:, :n], assisted[:, :n])


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", [*plans.QUESTION_FREE, plans.MERGED])
def test_second_turn_on_reused_cache(family: Family, name: str) -> None:
    """Through `generate`, which passes the whole conversation."""
    plans.skip_refused(family, name)
    model = family.build()
    turn1 = family.batch([[text(3), family.image(0), text(5, 3)]])
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        first = oracle.generate(model, turn1, 5)
        cache = oracle.cache_of(first)
        ids = torch.cat([first.sequences, torch.tensor([text(4, 8)])], 1)
        after = {**turn1, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        after = family.finish(after)
        rest = {k: v for k, v in after.items() if k in TEXT}
        second = oracle.generate(model, rest, 6, past_key_values=cache)
        whole = oracle.generate(model, after, 6)
    assert oracle.close(second, whole, 1e-4)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", [*plans.QUESTION_FREE, plans.MERGED])
def test_second_image_on_reused_cache(family: Family, name: str) -> None:
    """Turn 2 brings its own image: it is compressed on top of a compressed cache."""
    plans.skip_refused(family, name)
    if family.name in HYBRID:
        pytest.skip("test_layer_types.py has it")
    plan = plans.make(name, family.layers)
    assert oracle.image_in_second_turn(family, family.build(), plan=plan) < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "vanish"])
def test_several_words_on_a_ragged_cache(family: Family, name: str) -> None:
    """Also where samples have changed places, or the plan, since the cache was made."""
    plans.skip_refused(family, name)
    model, inputs = family.build(), ragged(family)
    new, where = torch.tensor([text(5, 20 + b) for b in range(3)]), family.positions(model, inputs)
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        out = model(**inputs, position_ids=where, use_cache=True)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        if name == "vanish":
            handle.set(ratio=0.5, reducer="uniform")
        order, turn = torch.tensor([2, 0, 1]), oracle.later_turn(inputs, where, new, out)
        oracle.cache_of(out).reorder_cache(order)
        moved = {k: v[..., order, :] if isinstance(v, torch.Tensor) else v for k, v in turn.items()}
        logits = model(**moved, use_cache=True).logits
    expected = oracle.masked_logits(model, family, inputs, masks, new)[:, -5:]
    assert oracle.difference(logits, expected[order]) < (5e-5 if family.name in HYBRID else 1e-5)


def test_no_cache(family: Family) -> None:
    model, inputs = family.build(), single(family)
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        cached = oracle.generate(model, inputs, 5)
        bare = oracle.generate(model, inputs, 5, use_cache=False)
    assert torch.equal(cached.sequences, bare.sequences)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_streaming_and_sampled_sequences(name: str) -> None:
    """num_return_sequences draws from the compressed model's distribution, row by row."""

    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    family = FAMILIES[name]
    model, inputs = family.build(), single(family)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=10)
    options = dict(do_sample=True, num_return_sequences=3, temperature=1.5)
    with tokencomp.patch(model, 0.6, reducer="uniform"):
        out = oracle.generate(model, inputs, 6)
        oracle.generate(model, inputs, 6, streamer=streamer)
        many = oracle.generate(model, inputs, 4, **options)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer).split() == [str(int(i)) for i in new]
    assert many.sequences.shape[0] == 3
    assert oracle.difference(many.logits[0], out.logits[0].expand(3, -1)) < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", plans.DISTINCT)
def test_kv_bytes(family: Family, name: str) -> None:
    """An unpadded cache holds the kept tokens of every layer, to the byte."""
    plans.skip_refused(family, name)
    if family.name in HYBRID or family.name == "kimi_k25":
        pytest.skip("keys and values of its layers have several sizes, see test_layer_types.py")
    model, inputs = family.build(), family.batch([rows(family)[1]])
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        layers = oracle.cache_of(model(**inputs, use_cache=True)).layers
        masks = oracle.kept_columns(handle, inputs, family.layers)
    held = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    config = family.decoder(model).config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * head_dim * 4
    assert held == sum(int(m.sum()) for m in masks) * per_token
    assert held == handle.stats.kv_bytes_after < handle.stats.kv_bytes_before


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


BATCHED = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=NO_EOS, pad_token_id=0)
WORDS = [text(9), text(6, 2)]


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Of continuous batching."""
    out = model.generate_batch(inputs=prompts, generation_config=BATCHED, progress_bar=False)
    return [result.generated_tokens for result in out.values()]


def test_media_in_continuous_batching_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), single(family)
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    ids = inputs["input_ids"].tolist()
    with tokencomp.patch(model, plan=ENTRY):
        with pytest.raises(UnsupportedCacheError, match="or placeholders"):
            answers(model, [text(4), *ids])
        with pytest.raises(UnsupportedCacheError, match="brings images"):
            model.generate(**inputs, generation_config=BATCHED, cache_implementation="paged")
    refused = pytest.raises(NoVisualInputError, match="continuous batching")
    with tokencomp.patch(model, plan=ENTRY, strict=True), refused:
        answers(model, WORDS)
