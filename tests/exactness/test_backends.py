"""FlashAttention and FlexAttention give what SDPA gives: on a CPU, with stand-ins for both.

transformers' own code of both paths runs; what stands in for the kernels is `support.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import backends, kinds, oracle, packed, plans, ways
from support.backends import FLASH, FLEX
from support.families import FAMILIES, Family
from support.family.hybrid import HYBRID
from support.family.structural import STRUCTURAL
from torch import nn

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.errors import TokenCompError, UnsupportedCacheError, UnsupportedModelError

FAMILY_NAMES = sorted({**FAMILIES, **HYBRID, **STRUCTURAL})
QUICK = {"qwen2_vl", "llava_onevision", "gemma3"}
LONG_FAMILIES = set(FAMILY_NAMES) - QUICK
UNIFORM = make_reducer("uniform")
SETTINGS: dict[str, Callable[[Family], dict[str, Any]]] = {
    **{name: lambda f, name=name: {"plan": plans.make(name, f.layers)} for name in plans.NAMES},
    "condiv": lambda f: {"ratio": 0.5, "reducer": plans.RELEVANT},
    "compact": lambda f: {"ratio": 0.5, "reducer": "uniform", "positions": "compact"},
    "weights": lambda f: {
        "ratio": 0.6,
        "reducer": "kcenter",
        "merge": True,
    },
    "tower": lambda f: {
        "plan": Plan((Stage(0, 0.4, UNIFORM),), TowerStage(0, 0.6, make_reducer("random")))
    },
}
# Every setting greedily, and every other way with one setting that it takes.
CASES = [("greedy", name) for name in SETTINGS]
CASES += [(way, "both") for way in ("beams", "turns", "training", "packed")]
CASES += [(way, name) for way in ("chunks", "static") for name in ("entry", "weights")]
# FlashAttention counts windows in rows, and finds the bounds of packed prompts by positions.
WINDOWED = 'a window of 8. The backend flash_attention_2 .* in rows.* attn_implementation="sdpa"'
REFUSED = {"mistral3": 'read positions themselves.*attn_implementation="sdpa"'}
REFUSED |= dict.fromkeys(("gemma3", "gemma4", "gemma4_e"), WINDOWED)


@pytest.fixture(params=[FLASH, FLEX])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    backends.install(monkeypatch, request.param)
    return request.param


def call(model: nn.Module, family: Family, way: str, name: str) -> Any:
    with tokencomp.patch(model, **SETTINGS[name](family)):
        return ways.WAYS[way](model, family)


def check_refusal(family: Family, other: str, run: Callable[[], Any]) -> bool:
    """Whether FlashAttention cannot serve the family; it then says so, and what to do."""
    if other != FLASH or family.name not in REFUSED:
        return False
    with pytest.raises(UnsupportedModelError, match=f"(?s){REFUSED[family.name]}"):
        run()
    return True


def misreads_static_caches(family: Family, other: str) -> bool:
    """Whether the release itself, unpatched, is wrong on static caches, as 5.6 still is."""
    expected, model = ways.static(family.build(), family)[-1], backends.build(family, other)
    found = ways.static(model, family)[-1]
    return bool((found - expected).abs().max() > 1e-2)


@pytest.mark.thin(2)
@pytest.mark.parametrize(("way", "name"), CASES)
@pytest.mark.parametrize("of", sorted(QUICK))
def test_equals_sdpa(of: str, other: str, way: str, name: str) -> None:
    family = {**FAMILIES, **HYBRID}[of]
    model = backends.build(family, other)
    try:
        expected = call(family.build(), family, way, name)
    except TokenCompError as refusal:
        pytest.skip(f"refused under SDPA too: {refusal}")
    if check_refusal(family, other, lambda: call(model, family, way, name)):
        return
    try:
        found = call(model, family, way, name)
    except UnsupportedCacheError:
        assert way == "static" and (other == FLEX or misreads_static_caches(family, other))
        return
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        # Gradients of models whose attention is made sharp are large.
        scale = float(theirs.abs().max()) if way == "training" else 0.0
        assert float((mine - theirs).abs().max()) < 2e-5 + 1e-3 * scale


def test_equals_the_masked_run(family: Family, other: str) -> None:
    """The full-length, unpatched run whose dropped columns are masked, under SDPA or eager."""
    model, inputs = backends.build(family, other), ways.ragged(family)
    late = 1 if family.name == "gemma4_e" else 2
    plan = Plan((Stage(0, 0.5, UNIFORM), Stage(late, 0.25, UNIFORM)))

    def run() -> Any:
        with tokencomp.patch(model, plan=plan) as handle:
            out = ways.generated(model, inputs)
            return out, oracle.kept_columns(handle, inputs, family.layers)

    if check_refusal(family, other, run):
        return
    out, masks = run()
    width = inputs["input_ids"].shape[1]
    expect = kinds.expected_logits if family.name in HYBRID else oracle.masked_logits
    expected = expect(family.build(), family, inputs, masks, out.sequences[:, width:-1])
    assert (torch.stack(out.logits, 1) - expected[:, width - 1 :]).abs().max() < 5e-5


@pytest.mark.skipif("glm4v" not in STRUCTURAL, reason="the release has no such model")
def test_gaps_in_positions_begin_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers take positions, and FlashAttention with them: behind a stage between layers."""
    backends.install(monkeypatch, FLASH)
    family = STRUCTURAL["glm4v"]
    found = call(backends.build(family, FLASH), family, "turns", "both")
    expected = call(family.build(), family, "turns", "both")
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_lengths_of_packed_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention takes the bounds of packed prompts as lengths, where they are given."""
    backends.install(monkeypatch, FLASH)
    family = FAMILIES[name]
    model, rows = backends.build(family, FLASH), packed.prompts(family)
    inputs = packed.pack(family, model, rows)
    lengths = torch.tensor([0, *(family.batch([row])["input_ids"].shape[1] for row in rows)])
    bounds, longest = lengths.cumsum(0).int(), int(lengths.max())
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    given |= {"max_length_q": longest, "max_length_k": longest}
    try:
        model(**inputs, **given, use_cache=False)
    except TypeError:
        pytest.skip("the release hands the lengths of prompts to the tower of this model")
    found = []
    for own, extra in ((model, given), (family.build(), {})):
        with tokencomp.patch(own, plan=plans.make("both", family.layers)), torch.no_grad():
            found.append(own(**inputs, **extra, use_cache=False).logits)
    assert (found[0] - found[1]).abs().max() < 2e-5
