"""Several prompts in one row: each is compressed, and answered, as if it were alone."""

from __future__ import annotations

import pytest
import torch
from support import oracle, plans
from support.families import CORE, FAMILIES, Family
from support.packed import pack, prompts

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.adapters.registry import adapter_for

FAMILY_NAMES = CORE
PLANS = {
    "condiv": (plans.RELEVANT, 0),
    "cdpruner": (make_reducer("cdpruner"), 0),
    "uniform": (make_reducer("uniform"), 0),
    "fastv": (make_reducer("prune"), 2),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLANS)
def test_packed_equals_alone(family: Family, name: str, backend: str) -> None:
    model, rows = family.build(backend), prompts(family)
    reducer, layer = PLANS[name]
    if layer:
        layer = max(layer, adapter_for(model).first_layer_stage)
    plan = Plan((Stage(layer, 0.5, reducer),))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        packed = model(**pack(family, model, rows), use_cache=False).logits[0]
        kept = [span for stage in handle.stats.kept(0) for span in stage]
        alone, expected = [], []
        for row in rows:
            inputs = family.batch([row])
            positions = family.positions(model, inputs)
            alone.append(model(**inputs, position_ids=positions, use_cache=False).logits[0])
            if handle.stats:
                expected += [span for stage in handle.stats.kept(0) for span in stage]
    assert kept == expected
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
def test_compact_positions_begin_again(name: str) -> None:
    family = FAMILIES[name]
    model, rows = family.build(), prompts(family)
    patched = tokencomp.patch(model, 0.5, reducer="uniform", positions="compact")
    with torch.no_grad(), patched:
        packed = model(**pack(family, model, rows), use_cache=False).logits[0]
        alone = [model(**family.batch([row]), use_cache=False).logits[0] for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_packed_equals_masked(family: Family) -> None:
    """Against the full-length, unpatched run whose dropped columns are hidden by a mask."""
    model, rows = family.build(), prompts(family)
    plan = plans.make("both", family.layers)
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        inputs = pack(family, model, rows)
        packed = model(**inputs, use_cache=False).logits[0]
        stats = handle.stats
        ones = {"attention_mask": torch.ones_like(inputs["input_ids"])}
        masks = oracle.kept_columns(handle, ones, family.layers)
    start = 0
    for row in rows:
        part = family.batch([row])
        n = part["input_ids"].shape[1]
        own = [mask[:, start : start + n] for mask in masks]
        full = oracle.masked_logits(model, family, part, own)[0]
        left = own[-1][0]
        torch.testing.assert_close(packed[start : start + n][left], full[left], atol=1e-4, rtol=0)
        start += n
    assert stats.ratio > 0.3


def test_flops_count_every_prompt_alone(family: Family) -> None:
    model, rows = family.build(), prompts(family)
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model(**pack(family, model, rows), use_cache=False)
        packed = handle.stats
        before = after = 0
        for row in rows[:2]:
            model(**family.batch([row]), use_cache=False)
            before += handle.stats.flops_before
            after += handle.stats.flops_after
        last = packed.shape.layer_flops(len(rows[2][0]), 0) * family.layers
    assert packed.flops_before == before + last
    assert packed.flops_after == after + last


def test_lengths_of_flash_attention_follow(family: Family) -> None:
    """`cu_seq_lens_*` count the rows that are left, at entry and behind a layer stage."""
    model, rows, seen = family.build(), prompts(family), []
    lengths = torch.tensor([0, *(family.batch([r])["input_ids"].shape[1] for r in rows)])
    bounds = lengths.cumsum(0).int()
    extra = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    extra |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("both", family.layers)):
        # Registered behind the hooks of the patch, these see what every layer sees.
        for layer in family.decoder(model).layers:
            layer.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append((args[0].shape[1], kwargs)), with_kwargs=True
            )
        model(**pack(family, model, rows), **extra, use_cache=False)
    assert seen[0][0] < int(bounds[-1]) and seen[-1][0] < seen[0][0]
    for width, kwargs in seen:
        cumulative = kwargs["cu_seq_lens_q"]
        assert cumulative.dtype == torch.int32 and int(cumulative[-1]) == width
        assert torch.equal(cumulative, kwargs["cu_seq_lens_k"])
        assert kwargs["max_length_q"] == int(cumulative.diff().max())
        assert len(cumulative) == len(rows) + 1
