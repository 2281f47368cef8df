"""torch.compile: decoding is one graph on a static cache, and so is everything at ratio 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.caches import ENTRY, LAYERS, ragged, single, static_cache
from support.compiled import breaks, compiled, graphs, reset
from support.families import CORE, FAMILIES, Family, text

import tokencomp

FAMILY_NAMES = CORE

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def test_decoding_is_one_graph(family: Family) -> None:
    """No break, and no recompilation for a prompt of another length that loses other tokens."""
    model = family.build()
    config = compiled(model)
    with tokencomp.patch(model, plan=ENTRY) as handle:
        dropped = set()
        for number in range(3):
            inputs = single(family, number)
            cache = static_cache(model, 128)
            out = oracle.generate(model, inputs, past_key_values=cache, compile_config=config)
            expected = oracle.generate(model, inputs)
            masks = oracle.kept_columns(handle, inputs, family.layers)
            assert torch.equal(out.sequences, expected.sequences)
            assert graphs() == 1 and not breaks()
            dropped.add(cache.layers[0].row_map.dropped)
    assert len(dropped) > 1
    new = out.sequences[:, -8:-1]
    logits = oracle.masked_logits(model, family, inputs, masks, new)[:, -8:]
    assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-5


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_decoding_a_ragged_batch_is_one_graph(family: Family, compiler: str) -> None:
    """The mask of a padded cache is made inside the graph, from what the cache layer holds."""
    model, inputs = family.build(), ragged(family)
    config = compiled(model, compiler)
    with tokencomp.patch(model, plan=ENTRY):
        options = {"cache_implementation": "static", "compile_config": config}
        out = oracle.generate(model, inputs, **options)
        expected = oracle.generate(model, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(out.logits, expected.logits, strict=True))
    assert graphs() == 1 and not breaks()


def test_a_step_without_generate() -> None:
    """torch.compile of the model itself, and tokens that are fed by hand, with a 2-D mask."""
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), ragged(family)
    n = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        expected = oracle.generate(model, inputs, 6)
        cache = static_cache(model, n + 6)
        positions = family.positions(model, inputs)
        model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        step = torch.compile(model, fullgraph=True, backend="eager")
        mask, last = inputs["attention_mask"], positions[:, -1:]
        for i in range(5):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            logits = step(
                input_ids=expected.sequences[:, n + i : n + i + 1],
                attention_mask=mask,
                position_ids=last + 1 + i,
                past_key_values=cache,
                use_cache=True,
            ).logits
            assert (logits[:, -1] - expected.logits[i + 1]).abs().max() < 1e-5


def test_fullgraph_at_ratio_zero(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(9)], [text(6, 2)]])
    with torch.no_grad():
        expected = model(**inputs).logits
        with tokencomp.patch(model, 0.0) as handle:
            model(**single(family))
            whole = torch.compile(model, fullgraph=True, backend="eager")
            assert torch.equal(whole(**inputs).logits, expected)
            assert not handle.stats
            positional = whole(inputs["input_ids"], attention_mask=inputs["attention_mask"])
            assert torch.equal(positional.logits, expected)


def test_hooks_act_after_a_traced_call() -> None:
    """What was compiled while there was nothing to do is not used where there is."""
    family = FAMILIES["llava_onevision"]
    model = family.build()
    plain, prompt = family.batch([[text(9)]]), single(family)
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        expected = model(**prompt).logits
        both = torch.compile(model, backend="eager")
        with handle.disabled():
            both(**plain)
        handle.set(ratio=0.0, reducer="uniform")
        both(**plain)
        handle.set(plan=ENTRY)
        assert (both(**prompt).logits - expected).abs().max() < 1e-5
        assert handle.stats.ratio > 0.2


def compile_layers(family: Family, model: Any) -> None:
    for layer in family.decoder(model).layers:
        layer.compile(backend="eager", dynamic=True)


def compile_decoder(family: Family, model: Any) -> None:
    decoder = family.decoder(model)
    decoder.forward = torch.compile(decoder.forward, backend="eager", dynamic=True)


def compile_model(family: Family, model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)


@pytest.mark.parametrize(
    ("change", "early"), [(compile_layers, True), (compile_decoder, False), (compile_model, True)]
)
def test_layer_hooks_act_after_calls_without_them(change: Any, early: bool) -> None:
    """A decode step has removed the hooks, or none was there; then calls are compiled."""
    family = FAMILIES["llava_onevision"]
    model = family.build()
    plain, prompt = family.batch([[text(9)]]), single(family)
    with torch.no_grad(), tokencomp.patch(model, plan=LAYERS) as handle:
        expected = oracle.generate(model, prompt, 4)
        if early:  # compiled while there are no hooks
            change(family, model)
            model(**plain)
        oracle.generate(model, prompt, 4)
        if not early:
            change(family, model)
            model(**plain)
        for inputs in (plain, prompt):
            out = oracle.generate(model, inputs, 4)
        assert torch.equal(out.sequences, expected.sequences)
        assert handle.stats and handle.stats.ratio > 0.1


def test_decoding_is_one_graph_with_scores_at_entry(family: Family) -> None:
    """The rotary module, whose forward is replaced under such plans, breaks no graph."""
    model, inputs = family.build(), single(family)
    config = compiled(model)
    with tokencomp.patch(model, 0.5, reducer=plans.RELEVANT):
        options = {"cache_implementation": "static", "compile_config": config}
        out = oracle.generate(model, inputs, **options)
        expected = oracle.generate(model, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert graphs() == 1 and not breaks()
