"""FlashAttention and FlexAttention give what SDPA gives: on a CPU, with stand-ins for both.

transformers' own code of both paths runs; what stands in for the kernels is `support.backends`.
FlexAttention measures windows in columns of the uncompressed prompt, as SDPA does. FlashAttention
counts rows, and knows no blocks of images: it is exact against itself, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import backends, oracle, plans, ways
from support.backends import FLASH, FLEX
from support.families import FAMILIES, Family, text
from support.family import hybrid
from support.family.hybrid import HYBRID, Gemma3
from support.family.llava import LlavaOn
from support.family.structural import STRUCTURAL
from support.prompts import ragged
from torch import nn

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.errors import (
    OptionError,
    TokenCompError,
    UnsupportedCacheError,
    UnsupportedModelError,
)

FAMILY_NAMES = sorted({**FAMILIES, **HYBRID, **STRUCTURAL})
QUICK = {"qwen2_vl", "llava_onevision", "gemma3"}
LONG_FAMILIES = set(FAMILY_NAMES) - QUICK
UNIFORM = make_reducer("uniform")
SETTINGS: dict[str, Callable[[Family], dict[str, Any]]] = {
    **{name: lambda f, name=name: {"plan": plans.make(name, f.layers)} for name in plans.NAMES},
    "condiv": lambda f: {"ratio": 0.5, "reducer": plans.RELEVANT},
    "compact": lambda f: {"ratio": 0.5, "reducer": "uniform", "positions": "compact"},
    "weights": lambda f: {"ratio": 0.6, "reducer": "kcenter", "merge": True},
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
    if way == "static" and (other == FLEX or misreads_static_caches(family, other)):
        with pytest.raises(UnsupportedCacheError):
            call(model, family, way, name)
        return
    found = call(model, family, way, name)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        # Gradients of models whose attention is made sharp are large.
        scale = float(theirs.abs().max()) if way == "training" else 0.0
        assert float((mine - theirs).abs().max()) < 2e-5 + 1e-3 * scale


def test_equals_the_masked_run(family: Family, other: str) -> None:
    """The full-length, unpatched run whose dropped columns are masked, under SDPA or eager."""
    model, inputs = backends.build(family, other), ragged(family)
    late = 1 if family.name == "gemma4_e" else 2
    plan = Plan((Stage(0, 0.5, UNIFORM), Stage(late, 0.25, UNIFORM)))

    def run() -> Any:
        return oracle.generated(model, family, inputs, ways.STEPS, plan=plan)

    if check_refusal(family, other, run):
        return
    _, out, masks = run()
    plain = family.build()
    assert oracle.deviation(plain, family, inputs, out, masks) < 5e-5


WINDOW, STEPS = 12, 6
MISTRAL = LlavaOn(transformers.MistralConfig, sliding_window=WINDOW)


class OpenGemma3(Gemma3):
    """Gemma 3 whose windows hold the whole prompt."""

    def config(self) -> Any:
        config = super().config()
        config.text_config.sliding_window = 200
        return config


def turn_of_text(model: nn.Module, family: Family, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a second turn, of several words in every sample."""
    where = family.positions(model, inputs)
    out = model(**inputs, position_ids=where, use_cache=True)
    new = torch.tensor([text(5, 20 + b) for b in range(len(where))])
    return oracle.later_turn(inputs, where, new, out)


@pytest.mark.parametrize("name", ["both", "attention"])
def test_flex_measures_windows_in_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ragged batch, and more tokens than the window holds."""
    backends.install(monkeypatch, FLEX)
    model, inputs = backends.build(MISTRAL, FLEX), ragged(MISTRAL)
    plan = plans.make(name, MISTRAL.layers)
    _, out, masks = oracle.generated(model, MISTRAL, inputs, STEPS, plan=plan)
    assert inputs["input_ids"].shape[1] > 2 * WINDOW
    plain = MISTRAL.build()
    assert oracle.deviation(plain, MISTRAL, inputs, out, masks) < 2e-5


def test_flash_counts_windows_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is refused in original positions, and equals SDPA in compact ones."""
    backends.install(monkeypatch, FLASH)
    model, inputs = backends.build(MISTRAL, FLASH), ragged(MISTRAL)
    with tokencomp.patch(model, 0.5), pytest.raises(UnsupportedModelError, match="in rows"):
        model(**inputs)
    found = []
    for own in (model, MISTRAL.build()):
        with tokencomp.patch(own, 0.5, reducer="uniform", positions="compact"):
            found.append(torch.stack(oracle.generate(own, inputs, STEPS).logits))
    assert oracle.difference(*found) < 2e-5


@pytest.mark.parametrize("name", ["both", "attention"])
def test_flash_on_gemma3_is_exact_against_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the masked run of plain causal layers: FlashAttention sees no blocks of images."""
    backends.install(monkeypatch, FLASH)
    family = OpenGemma3()
    model, inputs = backends.build(family, FLASH), ragged(family)
    width, plain = inputs["input_ids"].shape[1], family.build()
    words = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}  # no image blocks
    with torch.no_grad():
        causal = plain(**words).logits[:, -1]
        assert oracle.difference(model(**inputs).logits[:, -1], causal) < 2e-5
        assert oracle.difference(plain(**inputs).logits[:2, -1], causal[:2]) > 1e-3
    plan = plans.make(name, family.layers)
    _, out, masks = oracle.generated(model, family, inputs, STEPS, plan=plan)
    assert oracle.deviation(plain, family, words, out, masks) < 2e-5
    with tokencomp.patch(model, plan=plan), torch.no_grad():
        turn = turn_of_text(model, family, inputs)
        later = model(**turn).logits
    expected = oracle.masked_logits(plain, family, words, masks, turn["input_ids"])
    assert oracle.difference(later, expected[:, width:]) < 2e-5


@pytest.mark.parametrize("backend", ["eager", FLASH])
@pytest.mark.parametrize("name", [n for n in ("gemma3", "gemma4") if n in HYBRID])
def test_compact_positions_in_windows_of_gemma(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the unpatched model on the kept embeddings alone; masks that the body made are refused.

    FlashAttention takes no masks of the body.
    """
    backends.install(monkeypatch, backend)
    family = HYBRID[name]
    inputs = family.batch([[text(3), family.image(), text(12, 3), family.image(), text(5, 4)]])
    model = backends.build(family, backend)
    if backend == "eager":
        refused = pytest.raises(OptionError, match=r"sliding-window masks \(8\) from uncompressed")
        with tokencomp.patch(model, 0.5, positions="compact"), refused:
            model(**inputs)
        monkeypatch.setattr(hybrid, "WINDOW", 64)
        model = type(family)().build("eager")  # models are kept by family
    with torch.no_grad():
        with tokencomp.patch(model, 0.5, reducer="uniform", positions="compact") as handle:
            found = model(**inputs).logits
            left = oracle.kept_columns(handle, inputs, family.layers)[-1][0]
        embeds = oracle.decoder_inputs(model, family, inputs)["inputs_embeds"]
        columns = ("attention_mask", "token_type_ids", "mm_token_type_ids")
        short = {k: inputs[k][:, left] for k in columns if k in inputs}
        expected = model(inputs_embeds=embeds[:, left], **short).logits
    assert oracle.difference(found[:, left], expected) < 1e-5
    assert int(left.sum()) < len(left) - 15
