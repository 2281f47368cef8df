"""A patch on a patched model: what a `with` block brings back, and what it does not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.families import FAMILIES, Family
from support.hooks import hooks_of, prompt

import tokencomp
from tokencomp.engine.context import restore_visual_context
from tokencomp.engine.hooks import Hooks


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


@pytest.mark.parametrize("window", ["before", "inside", "undone"])
def test_a_window_of_the_users_own_outlives_the_block(window: str) -> None:
    """Where it took the place of the outer patch's, or was made in the inner block."""
    model = FAMILIES["qwen2_vl"].build()
    rotary = model.model.language_model.rotary_emb
    plain = rotary.inv_freq.clone()
    with tokencomp.patch(model, 0.5, extend_context=30000):
        stretched = rotary.inv_freq.clone()
        assert not torch.equal(stretched, plain)
        if window == "before":
            tokencomp.extend_visual_context(model, 500, window=100)
        if window == "undone":
            restore_visual_context(model)
        mine = rotary.inv_freq.clone()
        with tokencomp.patch(model, 0.9):
            if window == "inside":
                tokencomp.extend_visual_context(model, 500, window=100)
                mine = rotary.inv_freq.clone()
        assert torch.equal(rotary.inv_freq, mine) and not torch.equal(mine, stretched)


def test_a_window_inside_gives_way_to_the_one_outside() -> None:
    model = FAMILIES["qwen2_vl"].build()
    rotary = model.model.language_model.rotary_emb
    plain = rotary.inv_freq.clone()
    with tokencomp.patch(model, 0.5, extend_context=30000):
        outer = rotary.inv_freq.clone()
        with tokencomp.patch(model, 0.9, extend_context=90000):
            assert not torch.equal(rotary.inv_freq, outer)
        assert torch.equal(rotary.inv_freq, outer)
        with pytest.raises(tokencomp.TokenCompError, match="target_tokens"):
            tokencomp.patch(model, 0.9, extend_context=-1)
        assert torch.equal(rotary.inv_freq, outer)
    assert torch.equal(rotary.inv_freq, plain)


def test_a_patch_that_cannot_be_put_in_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, install = FAMILIES["qwen2_vl"].build(), Hooks.install
    clean = hooks_of(model)
    with tokencomp.patch(model, 0.5) as handle:
        before = hooks_of(model)

        def once(self: Hooks) -> None:
            monkeypatch.undo()
            install(self)
            raise ZeroDivisionError

        monkeypatch.setattr(Hooks, "install", once)
        with pytest.raises(ZeroDivisionError):
            tokencomp.patch(model, 0.9)
        assert hooks_of(model) == before
        handle.set(ratio=0.4)
    assert hooks_of(model) == clean


def test_replaced_patches_are_let_go() -> None:
    model = FAMILIES["qwen2_vl"].build()
    handles = [weakref.ref(tokencomp.patch(model, 0.5)) for _ in range(5)]
    gc.collect()
    assert [ref() is None for ref in handles] == [True] * 3 + [False] * 2
