"""A training step under a patch: checkpointed layers, autocast, accelerate."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES, Family, text
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import tokencomp
from tokencomp import Kept, Tokens, make_reducer
from tokencomp.errors import AlreadyCompressedError, OptionError
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss on the last four tokens, and the loss."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "reducer",
    [
        pytest.param(plans.RELEVANT, id="condiv"),
        "bipartite",
        "prune",
        "fastv",
        "adsc",
        "condiv+prune",
    ],
)
def test_gradient_checkpointing(family: Family, reducer: Any) -> None:
    """The same gradients as without; scores of a layer are not recorded in its first pass alone."""
    model = family.build().train()
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        expected = step(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if handle.plan.layer_stages and "__call__" in vars(GradientCheckpointingLayer):
            with pytest.raises(OptionError, match="transformers >= 5"):
                step(model, inputs)
            return
        got = step(model, inputs)
        assert handle.stats.ratio > 0.3
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.thin(2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reducer", ["kcenter", "fastv", "kcenter+fastv"])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_checkpointed_layers_know_the_weights(name: str, reducer: str, reentrant: bool) -> None:
    """Also when another prompt has run before the backward pass, and after a later patch."""
    family = FAMILIES[name]
    model = family.build().train()
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    other = family.batch([[text(2), family.image(1), text(6, 2)], [text(9, 2)]])

    def both() -> dict[str, Tensor]:
        """Gradients of the sum of two losses, whose layers run again after both have run."""
        model.zero_grad(set_to_none=True)
        losses = [model(**one, labels=one["input_ids"]).loss for one in (inputs, other)]
        sum(losses).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with tokencomp.patch(model, 0.5, reducer=reducer, merge=True) as handle:
        expected = step(model, inputs), both()
        before = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
        assert not any(before)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
        if handle.plan.layer_stages and "__call__" in vars(GradientCheckpointingLayer):
            with pytest.raises(OptionError, match="transformers >= 5"):
                step(model, inputs)
            return
        got = step(model, inputs), both()
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, msg=key)
    after = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    assert all(a is b for a, b in zip(after, functions, strict=True))
    with tokencomp.patch(model, 0.5, reducer=reducer):
        dropped = step(model, inputs)
    assert (dropped["loss"] - got[0]["loss"]).abs() > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("end", ["unpatch", "set", "patch"])
def test_a_backward_pass_behind_the_patch(end: str, reentrant: bool) -> None:
    """Layers that run once more have the weights of their first run, whatever is in force."""
    family = FAMILIES["qwen2_vl"]
    model = family.build().train()
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    with tokencomp.patch(model, 0.5, reducer="kcenter", merge=True):
        expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    model.zero_grad(set_to_none=True)
    handle = tokencomp.patch(model, 0.5, reducer="kcenter", merge=True)
    loss = model(**inputs, labels=labels).loss
    if end == "unpatch":
        handle.remove()
    elif end == "set":
        handle.set(ratio=0)
    else:
        tokencomp.patch(model, 0.25, reducer="kcenter")
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    tokencomp.unpatch(model)
    assert not any(
        hasattr(m.__dict__.get("config"), "tokencomp_bias_dims") for m in model.modules()
    )


@dataclasses.dataclass(frozen=True)
class Spy(tokencomp.Reducer):
    """Asks another reducer, and again outside of autocast."""

    inner: Any = None
    seen: Any = None

    @property
    def needs(self) -> Any:
        return self.inner.needs

    def reduce(self, tokens: Tokens) -> Kept:
        with torch.autocast("cpu", enabled=False):
            expected = self.inner.reduce(tokens)
        found = self.inner.reduce(tokens)
        self.seen.append((found, expected))
        return found


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "reducer", ["condiv", "divprune", "cdpruner", "bipartite", "vidcom2", "prune"]
)
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "vila"])
def test_autocast(name: str, reducer: str) -> None:
    """Reducers score in fp32 there too, and dropping equals masking up to bf16."""
    family, seen = FAMILIES[name], []
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    inner = make_reducer(reducer)
    layer = 0 if reducer != "prune" else 1
    plan = Plan((Stage(layer, 0.5, Spy(inner=inner, seen=seen)),))
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        tokencomp.patch(model, plan=plan) as handle,
    ):
        logits = model(**inputs, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
        assert seen and handle.stats.ratio > 0.3
        for found, expected in seen:
            assert torch.equal(found.rows, expected.rows)
        if inner.traits.merges:
            return
        handle.remove()
        full = oracle.masked_logits(model, family, inputs, masks)
    left = masks[-1]
    torch.testing.assert_close(logits[left], full[left], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("first", ["patch", "prepare"])
def test_accelerate_mixed_precision(first: str) -> None:
    """`Accelerator.prepare` replaces `forward`; the patch goes on below or on top of it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        if first == "patch":
            handle = tokencomp.patch(model, 0.5)
            prepared = accelerator.prepare_model(model)
        else:
            prepared = accelerator.prepare_model(model)
            handle = tokencomp.patch(prepared, 0.5)
        step(prepared, inputs)
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.1)
        tokencomp.patch(prepared, 0.75, reducer="prune").remove()  # once more
        prepared.forward = lambda *args, **kwargs: None
        with pytest.raises(AlreadyCompressedError, match="forward replaced"):
            tokencomp.patch(prepared, 0.5)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first", ["prepare", "patch", "between", "unpatch"])
@torch.no_grad()
def test_accelerate_unwraps_mixed_precision(first: str) -> None:
    """`unwrap_model(keep_fp32_wrapper=False)` binds what it finds inside of its wrappers.

    The patch comes behind it, before `prepare`, between both, or goes between both.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    plain = model(**inputs).logits
    with tokencomp.patch(model, 0.5):
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        if first in ("patch", "unpatch"):
            tokencomp.patch(model, 0.5)
        accelerator.prepare_model(model)
        if first == "between":
            tokencomp.patch(model, 0.5)
        if first == "unpatch":
            tokencomp.unpatch(model)
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if first in ("prepare", "unpatch"):
            assert torch.equal(model(**inputs).logits, plain)
            tokencomp.patch(model, 0.5)
        for _ in range(2):
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model.forward(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, max_new_tokens=3), tokens)
            tokencomp.patch(model, 0.5)  # once more
        tokencomp.unpatch(model)
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.forward(**inputs).logits, plain)
        model.forward = lambda *args, **kwargs: None
        with pytest.raises(AlreadyCompressedError, match="forward replaced"):
            tokencomp.patch(model, 0.5)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_label_behind_a_dropped_token(family: Family) -> None:
    """An image, then its caption: the first word of the caption is learnt too."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(6, 2)]])
    visual = inputs["attention_mask"].new_tensor(
        [i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token in (150, 151)]
    )
    first = int(visual[-1]) + 1
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, first] = inputs["input_ids"][0, first]
    plan = Plan((Stage(0, 0.3, make_reducer("random", seed=3)),))
    with tokencomp.patch(model, plan=plan) as handle:
        loss = model(**inputs, labels=labels).loss
        masks = oracle.kept_columns(handle, inputs, family.layers)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    logits = oracle.masked_logits(model, family, inputs, masks)
    scores = oracle.repeated(logits, masks[-1])[0, first - 1]
    expected = torch.nn.functional.cross_entropy(scores[None], labels[0, first : first + 1])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
