"""torch.compile: decoding is one graph on a static cache, and so is everything at ratio 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.caches import ENTRY, static_cache
from support.families import CORE, FAMILIES, Family, text
from support.prompts import ragged, single
from transformers.generation.configuration_utils import CompileConfig

import tokencomp

FAMILY_NAMES = [*CORE, "smolvlm", "fast_vlm", "glm4v", "kimi_k25"]
STEPS = 5

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model: Any, backend: str = "eager") -> dict[str, Any]:
    """Options that make `generate` compile on a CPU too; skips where it cannot, unpatched."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    if not hasattr(config, "_compile_all_devices"):
        pytest.skip("this release compiles on accelerators alone")
    config._compile_all_devices = True
    return {"compile_config": config, "cache_implementation": "static"}


def graphs() -> int:
    """Graphs since the last reset, of which none may have ended early."""
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("reducer", ["uniform", pytest.param(plans.RELEVANT, id="condiv")])
def test_decoding_is_one_graph(family: Family, reducer: Any) -> None:
    """Also with scores at entry; none is compiled for other prompts that lose other tokens."""
    model = family.build()
    options, dropped = compiled(model), set()
    del options["cache_implementation"]
    with tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        for count in range(1, 4):
            images = [family.image(i % 2) for i in range(count)]
            inputs = family.batch([[text(2 + count), *images, text(9, 3)]])
            options["past_key_values"] = static_cache(model, 256)
            out = oracle.generate(model, inputs, STEPS, **options)
            masks = oracle.kept_columns(handle, inputs, family.layers)
            assert graphs() == 1
            dropped.add(int((~masks[0]).sum()))
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5
    assert len(dropped) > 1


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_padded_batch_is_one_graph(family: Family, compiler: str) -> None:
    """The mask of a padded cache is made inside the graph, from what the cache layer holds."""
    model, inputs = family.build(), ragged(family)
    call = compiled(model, compiler)
    _, out, masks = oracle.generated(model, family, inputs, STEPS, call, plan=ENTRY)
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5
    assert graphs() == 1


def test_merged_tokens_are_one_graph(family: Family) -> None:
    """The mask of a step, made inside the graph, adds the logarithms of the weights."""
    if family.name == "kimi_k25":
        pytest.skip("torch has no float64 for its experts")
    model, inputs = family.build(), ragged(family)
    setting = {"ratio": 0.6, "reducer": "kcenter", "merge": True}
    handle, out, masks = oracle.generated(model, family, inputs, STEPS, compiled(model), **setting)
    assert oracle.deviation(model, family, inputs, out, masks, oracle.Merged(handle)) < 1e-5
    assert graphs() == 1


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


@pytest.mark.parametrize("plan", ["entry", "attention"])
def test_what_was_compiled_follows_the_patch(plan: str) -> None:
    """Compiled before the patch, while there is nothing to do, or disabled."""
    family = FAMILIES["llava_onevision"]
    model, words, prompt = family.build(), family.batch([[text(9)]]), single(family)
    stages = plans.make(plan, family.layers)
    both = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(**prompt).logits
        with tokencomp.patch(model, plan=stages):
            expected = model(**prompt).logits
        assert torch.equal(both(**prompt).logits, plain)
        for _ in range(2):
            with tokencomp.patch(model, plan=stages) as handle:
                assert oracle.difference(both(**prompt).logits, expected) < 1e-5
                with handle.disabled():
                    both(**words)
                handle.set(ratio=0.0, reducer="uniform")
                both(**words)
                handle.set(plan=stages)
                assert oracle.difference(both(**prompt).logits, expected) < 1e-5
                assert handle.stats.ratio > 0.1
            assert torch.equal(both(**prompt).logits, plain)
