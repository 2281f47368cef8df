"""Patching and unpatching leave no trace; a block brings back what it replaced."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import CORE, FAMILIES, Family, text
from support.prompts import hooks_of, prompt
from transformers.cache_utils import DynamicLayer

import tokencomp
from tokencomp.errors import CopyError

FAMILY_NAMES = CORE


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention", plans.MERGED, "tower", "signals"])
def test_unpatch_restores_everything(family: Family, name: str) -> None:
    """Hooks, state dict, config, caches and logits, bit by bit; and while the patch is disabled."""
    setting = {"tower": {"ratio": 0.5, "tower_ratio": 0.3}}
    setting["signals"] = {"ratio": 0.5, "reducer": "visionzip"}
    setting = setting.get(name) or {"plan": plans.make(name, family.layers)}
    model, inputs = family.build(), prompt(family)
    model(**inputs)  # some modules note things at their first call
    before, state = hooks_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    config, held = (
        copy.deepcopy(model.config.to_dict()),
        [vars(m).get("config") for m in model.modules()],
    )
    with torch.no_grad():
        expected = model(**inputs).logits
        handle = tokencomp.patch(model, **setting)
        assert not torch.equal(model(**inputs).logits, expected)
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, expected)
        assert model.state_dict().keys() == state.keys()
        assert model.config.to_dict() == config
        handle.remove()
        handle.remove()
        assert hooks_of(model) == before
        out = model(**inputs, use_cache=True)
    assert torch.equal(out.logits, expected)
    assert all(type(layer) is DynamicLayer for layer in oracle.cache_of(out).layers)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    now = [vars(m).get("config") for m in model.modules()]
    assert all(a is b for a, b in zip(now, held, strict=True))


def test_patch_twice_is_patch_once(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    model(**inputs)
    clean = hooks_of(model)
    first = tokencomp.patch(model, 0.9, reducer="random")
    tokencomp.unpatch(model)
    tokencomp.patch(model, 0.5, reducer="uniform")
    once, logits = hooks_of(model), model(**inputs).logits
    tokencomp.patch(model, 0.9, reducer="random")
    tokencomp.patch(model, 0.5, reducer="uniform")
    assert hooks_of(model) == once
    assert torch.equal(model(**inputs).logits, logits)
    first.remove()  # a handle that was replaced must not undo its successor
    assert torch.equal(model(**inputs).logits, logits)
    tokencomp.unpatch(model)
    tokencomp.unpatch(model)
    assert hooks_of(model) == clean


def test_context_manager_disabled_and_set(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    plain = model(**inputs).logits
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        half = model(**inputs).logits
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.05)
        with pytest.raises(ZeroDivisionError), handle.disabled():
            assert torch.equal(model(**inputs).logits, plain)
            1 / 0  # noqa: B018
        assert torch.equal(model(**inputs).logits, half)
        handle.set(ratio=0.8)
        model(**inputs)
        assert handle.stats.ratio > 0.7
        handle.set(ratio=0.5, tower_ratio=0.3)
        assert not torch.equal(model(**inputs).logits, half)
        handle.set(ratio=0.5, tower_ratio=0.0, reducer="prune", score="last_query")
        model(**inputs)
        assert handle.plan.layer_stages
        handle.set(reducer="uniform")
        assert torch.equal(model(**inputs).logits, half)
        handle.set(merge=True)
        assert not torch.equal(model(**inputs).logits, half)
        handle.set(merge=False)
        assert torch.equal(model(**inputs).logits, half)
    assert torch.equal(model(**inputs).logits, plain)
    with pytest.raises(tokencomp.TokenCompError, match="removed"):
        handle.set(ratio=0.1)


def test_stats_are_of_the_last_prompt(family: Family) -> None:
    """None at ratio 0, where nothing is done, and after a prompt that brings no media."""
    model, inputs = family.build(), prompt(family)
    plain = model(**inputs, use_cache=True)
    with tokencomp.patch(model, 0.0) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        assert torch.equal(out.logits, plain.logits) and not handle.stats
        handle.set(ratio=0.5)
        assert not handle.stats
        model.generate(**inputs, max_new_tokens=3)
        stats = handle.stats
        visual = [sum(span.visual for span in row) for row in stats.spans]
        assert stats.tokens_before == visual and min(visual) > 0
        assert stats.ratio == pytest.approx(0.5, abs=0.05)
        rows = int(inputs["attention_mask"].sum())
        layers = oracle.cache_of(out).layers
        one = sum(t[0, :, 0].numel() * t.element_size() for x in layers for t in (x.keys, x.values))
        assert stats.kv_bytes_before == rows * one
        handle.set(ratio=0.0)
        assert not handle.stats
        handle.set(ratio=0.5)
        model.generate(**family.batch([[text(5)]]), max_new_tokens=3)
        assert not handle.stats


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "vila"])
def test_save_pretrained(name: str, tmp_path) -> None:
    family = FAMILIES[name]
    model, inputs = family.build(), prompt(family)
    model.generation_config.do_sample = None
    expected = model(**inputs).logits
    with tokencomp.patch(model, 0.7, reducer="aim"):
        model.save_pretrained(tmp_path / "patched")
    model.save_pretrained(tmp_path / "plain")
    plain = tmp_path / "plain"
    files = [f for f in plain.rglob("*") if f.is_file()]
    assert {f.name for f in files} >= {"config.json", "model.safetensors"}
    for file in files:
        assert file.read_bytes() == (tmp_path / "patched" / file.relative_to(plain)).read_bytes()
    again = family.model_class().from_pretrained(tmp_path / "patched").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-6, rtol=0)


def test_two_models() -> None:
    family = FAMILIES["qwen2_vl"]
    a, b, inputs = family.build(seed=1), family.build(seed=2), prompt(family)
    expected = []
    for model, ratio in ((a, 0.4), (b, 0.8)):
        with tokencomp.patch(model, ratio, reducer="uniform"):
            expected.append(oracle.generate(model, inputs).sequences)
    with tokencomp.patch(a, 0.4, reducer="uniform"), tokencomp.patch(b, 0.8, reducer="uniform"):
        for model, wanted in ((a, expected[0]), (b, expected[1]), (a, expected[0])):
            assert torch.equal(oracle.generate(model, inputs).sequences, wanted)


@pytest.mark.parametrize("setting", [{"reducer": "prune"}, {"reducer": "kcenter", "merge": True}])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_a_call_leaves_no_state(
    family: Family, error: type[BaseException], setting: dict[str, Any]
) -> None:
    """An interrupt from the keyboard skips the hooks that end a call."""
    model, inputs = family.build(), prompt(family)
    configs = [vars(m).get("config") for m in model.modules()]

    def fail(*_: object) -> None:
        raise error("out of memory, say")

    with tokencomp.patch(model, 0.5, **setting) as handle, torch.no_grad():
        expected = model(**inputs).logits
        hook = family.decoder(model).layers[-1].register_forward_pre_hook(fail)
        for call in (model, model.forward, model.generate):
            with pytest.raises(error):
                call(**inputs)
        hook.remove()
        now = [vars(m).get("config") for m in model.modules()]
        assert all(a is b for a, b in zip(now, configs, strict=True))
        handle.set(ratio=0.25).set(ratio=0.5)  # no call is in the way
        assert torch.equal(model.forward(**inputs).logits, expected)
        assert handle.stats.ratio > 0.3


def test_another_backend_between_two_calls() -> None:
    """Prompts that merge run under it: eager attention alone returns its maps."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build("sdpa"), prompt(family)
    call = {**inputs, "output_attentions": True}
    with tokencomp.patch(model, 0.5, reducer="kcenter", merge=True), torch.no_grad():
        for _ in range(2):  # the second call finds the views of the first
            assert not any(torch.is_tensor(one) for one in model(**call).attentions)
        family.decoder(model).config._attn_implementation = "eager"
        maps = [one for one in model(**call).attentions if torch.is_tensor(one)]
        assert len(maps) == family.layers


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention", "pagerank"])
def test_bfloat16(family: Family, name: str) -> None:
    model = family.build().to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompt(family).items()}
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        masks = oracle.kept_columns(handle, inputs, family.layers)
    expected = oracle.masked_logits(model, family, inputs, masks)[:, -1].float()
    # bf16 rounds at 2^-8 of the logit; both runs differ only in summation order
    assert oracle.difference(logits, expected) < 0.05 * expected.abs().max()


def test_a_patched_model_can_be_freed(family: Family) -> None:
    model = family.build()
    handle = tokencomp.patch(model, 0.5, reducer="aim", extend_context=True)
    model(**prompt(family))
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("setting", [{"reducer": "aim"}, {"tower_ratio": 0.3}], ids=str)
def test_copies_of_a_patched_model_are_refused(setting: dict[str, Any]) -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), prompt(family)
    parts = [model, model.model.visual if "tower_ratio" in setting else family.decoder(model)]
    with tokencomp.patch(model, 0.5, **setting) as handle, torch.no_grad():
        model(**inputs)  # from here on, layers may have hooks as well
        for part in parts:
            for copied in (copy.deepcopy, pickle.dumps):
                with handle.disabled(), pytest.raises(CopyError, match=r"unpatch\(model\) first"):
                    copied(part)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


# -- a patch on a patched model --------------------------------------------------------------------


def test_a_block_brings_back_what_it_replaced(family: Family) -> None:
    model, inputs = family.build(), prompt(family)

    def logits() -> torch.Tensor:
        return model(**inputs).logits

    plain = logits()
    clean = hooks_of(model)
    with tokencomp.patch(model, 0.5, reducer="uniform", extend_context=1 << 16) as outer:
        half, hooked = logits(), hooks_of(model)
        with tokencomp.patch(model, 0.9, reducer="random"):
            most = logits()
            with (
                pytest.raises(ZeroDivisionError),
                tokencomp.patch(model, 0.75, reducer="uniform"),
            ):
                with pytest.raises(tokencomp.TokenCompError, match="replaced"):
                    outer.set(ratio=0.1)
                raise ZeroDivisionError
            assert torch.equal(logits(), most)
            assert not torch.equal(most, half)
        assert hooks_of(model) == hooked
        assert torch.equal(logits(), half)
        outer.set(ratio=0.3)
    assert hooks_of(model) == clean
    assert torch.equal(logits(), plain)


@pytest.mark.parametrize("how", ["outer", "inner", "model"])
def test_a_block_brings_back_nothing_that_was_removed(how: str) -> None:
    model = FAMILIES["qwen2_vl"].build()
    clean = hooks_of(model)
    with tokencomp.patch(model, 0.5) as outer:
        with tokencomp.patch(model, 0.9) as inner:
            tokencomp.unpatch({"outer": outer, "inner": inner, "model": model}[how])
            assert (hooks_of(model) == clean) is (how != "outer")
        assert hooks_of(model) == clean
    assert hooks_of(model) == clean


def test_a_context_inside_gives_way_to_the_one_outside() -> None:
    """Also where a patch is refused."""
    model = FAMILIES["qwen2_vl"].build()
    rotary = model.model.language_model.rotary_emb
    plain = rotary.inv_freq.clone()
    with tokencomp.patch(model, 0.5, extend_context=30000) as handle:
        outer, hooked = rotary.inv_freq.clone(), hooks_of(model)
        with tokencomp.patch(model, 0.9, extend_context=90000):
            assert not torch.equal(rotary.inv_freq, outer)
        assert torch.equal(rotary.inv_freq, outer)
        with pytest.raises(tokencomp.TokenCompError, match="target_tokens"):
            tokencomp.patch(model, 0.9, extend_context=-1)
        assert torch.equal(rotary.inv_freq, outer) and hooks_of(model) == hooked
        handle.set(ratio=0.4)
    assert torch.equal(rotary.inv_freq, plain)
