"""Training under a patch: gradients, activation checkpointing of all kinds, autocast."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import oracle, plans, tower
from support.families import FAMILIES, Family, text
from support.family.hybrid import HYBRID
from support.prompts import one_of_text
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import tokencomp
from tokencomp import Kept, Plan, Stage, Tokens, TowerStage, make_reducer
from tokencomp.errors import OptionError

RANDOM = make_reducer("random")
# Every family with a tower stage. The mixture of experts of Qwen3-VL takes no float64; its tower is
# that of Qwen3-VL.
WITH_TOWERS = {**FAMILIES, **{name: HYBRID[name] for name in ("qwen3_5",) if name in HYBRID}}
NAMES = sorted(set(WITH_TOWERS) - {"qwen3_vl_moe"})
# One of every way in which a tower gets its full length back.
QUICK = {
    *(("qwen3_vl", "all"), ("llava_onevision", "all"), ("internvl", "all"), ("internvl", "tower")),
    *(("llava_next_video", "tower"), ("smolvlm", "tower"), ("vila", "tower")),
}
PLANS = {
    "tower": Plan((), TowerStage(0, 0.6, RANDOM)),
    "late": Plan((Stage(0, 0.3, RANDOM),), TowerStage(1, 0.6, RANDOM)),
    "entry": plans.make("entry", 4),
    "layer": plans.make("layer", 4),
    "all": Plan((Stage(0, 0.4, RANDOM), Stage(2, 0.2, RANDOM)), TowerStage(0, 0.6, RANDOM)),
}
CASES = [
    pytest.param(name, plan, marks=[] if (name, plan) in QUICK else [pytest.mark.long])
    for name in NAMES
    for plan in PLANS
]


def last_four(inputs: dict[str, Tensor]) -> Tensor:
    """Labels at the last four tokens of every row."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    return labels


def tower_prompts(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """Ragged: two images of different grids, and a video; every row ends in text."""
    first = [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)]
    return tower.like(model, family.batch([first, [family.video(4), text(6, 4)]]))


def gradients(model: Any, inputs: dict[str, Tensor], **call: Any) -> dict[str, Tensor]:
    """Of the loss on the last four tokens of every row, by parameter; zeros where there is none."""
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=last_four(inputs), use_cache=False, **call).loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_gradients_are_those_of_the_masked_run(name: str, plan: str) -> None:
    """Of every parameter of tower, projector and decoder, in float64 and with loud towers."""
    family = tower.deep(WITH_TOWERS[name])
    model = tower.build(family)
    inputs = tower_prompts(family, model)
    stage = PLANS[plan].tower
    if stage is not None:
        with tower.block_inputs(model, stage.block) as full, torch.no_grad():
            model(**inputs, use_cache=False)
    block = 0 if stage is None else stage.block
    with (
        tokencomp.patch(model, plan=PLANS[plan]) as handle,
        tower.block_inputs(model, block) as short,
    ):
        got = gradients(model, inputs)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    seen = [torch.ones_like(x[..., 0], dtype=torch.bool) for x in short]
    if stage is not None:
        seen = tower.seen_rows(full, short)
        assert all(not mask.all() for mask in seen)
    with (
        tower.tower_masks(model, seen, block),
        oracle.masked(model, family, masks),
    ):
        expected = gradients(model, inputs, position_ids=family.positions(model, inputs))
    whole = gradients(model, inputs, position_ids=family.positions(model, inputs))
    for key, value in expected.items():
        scale = max(float(whole[key].abs().max()), 1e-3)
        assert (got[key] - value).abs().max() < 1e-5 * scale, key
    assert any((whole[key] - value).abs().max() > 1e-3 for key, value in expected.items())


# -- layers that run again in the backward pass ----------------------------------------------------


def grads_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by parameter, under the names that they have without wrappers, and the loss."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = model.named_parameters()
    found = {n.replace(PREFIX, ""): p.grad.clone() for n, p in named if p.grad is not None}
    return {**found, "loss": loss.detach()}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss on the last four tokens, and the loss."""
    return grads_of(model, model(**inputs, labels=last_four(inputs)).loss)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


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
    inputs = one_of_text(family)
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        expected = step(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if handle.plan.layer_stages and "__call__" in vars(GradientCheckpointingLayer):
            with pytest.raises(OptionError, match="transformers >= 5"):
                step(model, inputs)
            return
        got = step(model, inputs)
        assert handle.stats.ratio > 0.3
    same(got, expected)


@pytest.mark.thin(2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reducer", ["kcenter", "fastv", "kcenter+fastv"])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_checkpointed_layers_know_the_weights(name: str, reducer: str, reentrant: bool) -> None:
    """Also when another prompt has run before the backward pass, and after a later patch."""
    family = FAMILIES[name]
    model = family.build().train()
    inputs = one_of_text(family)
    other = family.batch([[text(2), family.image(1), text(6, 2)], [text(9, 2)]])

    def both() -> dict[str, Tensor]:
        """Gradients of the sum of two losses, whose layers run again after both have run."""
        losses = [model(**one, labels=one["input_ids"]).loss for one in (inputs, other)]
        return grads_of(model, losses[0] + losses[1])

    with tokencomp.patch(model, 0.5, reducer=reducer, merge=True) as handle:
        expected = step(model, inputs), both()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if handle.plan.layer_stages and "__call__" in vars(GradientCheckpointingLayer):
            with pytest.raises(OptionError, match="transformers >= 5"):
                step(model, inputs)
            return
        got = step(model, inputs), both()
    for mine, theirs in zip(got, expected, strict=True):
        same(mine, theirs)
    with tokencomp.patch(model, 0.5, reducer=reducer):
        dropped = step(model, inputs)
    assert (dropped["loss"] - got[0]["loss"]).abs() > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("end", ["unpatch", "set", "patch"])
def test_a_backward_pass_behind_the_patch(end: str, reentrant: bool) -> None:
    """Layers that run once more have the weights of their first run, whatever is in force."""
    family = FAMILIES["qwen2_vl"]
    model = family.build().train()
    inputs = one_of_text(family)
    with tokencomp.patch(model, 0.5, reducer="kcenter", merge=True):
        expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handle = tokencomp.patch(model, 0.5, reducer="kcenter", merge=True)
    loss = model(**inputs, labels=last_four(inputs)).loss
    if end == "unpatch":
        handle.remove()
    elif end == "set":
        handle.set(ratio=0)
    else:
        tokencomp.patch(model, 0.25, reducer="kcenter")
    same(grads_of(model, loss), expected)
    tokencomp.unpatch(model)


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
    "reducer", ["condiv", "cdpruner", "visprune", "flashvid", "vidcom2", "prune"]
)
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "vila"])
def test_autocast(name: str, reducer: str) -> None:
    """Reducers score in fp32 there too, and dropping equals masking up to bf16."""
    family, seen = FAMILIES[name], []
    model = family.build()
    inputs = one_of_text(family)
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
            assert torch.equal(found.patches, expected.patches)
        if inner.traits.merges:
            return
        handle.remove()
        full = oracle.masked_logits(model, family, inputs, masks)
    left = masks[-1]
    torch.testing.assert_close(logits[left], full[left], atol=0.03, rtol=0.03)


FAMILY = FAMILIES["qwen2_vl"]
PROMPTS = (
    [[text(3), FAMILY.image(0), text(6, 3)], [text(9)]],
    [[text(2), FAMILY.image(1), text(7, 4)], [text(5), FAMILY.image(0), text(8, 2)]],
)
PREFIX = "_checkpoint_wrapped_module."


def loss_of(model: nn.Module) -> Tensor:
    """Of two calls, whose layers run again after both have run."""
    batches = [FAMILY.batch(rows) for rows in PROMPTS]
    losses = [model(**one, labels=last_four(one), use_cache=False).loss for one in batches]
    return losses[0] + losses[1]


def wrap(model: nn.Module, like: nn.Module, reentrant: bool) -> None:
    """Wrap modules of one kind, as FSDP's activation checkpointing does."""
    kind = type(like)
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, kind),
    )


@pytest.mark.thin(2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["layers", "attention"])
@pytest.mark.parametrize("order", ["wrap", "patch", "unpatch"])
@pytest.mark.parametrize("options", [{}, {"reducer": "fastv", "merge": True}], ids=str)
def test_wrapped_layers(options: dict[str, Any], order: str, part: str, reentrant: bool) -> None:
    """Wrapped before the patch or behind it; the patch may end before the backward pass."""
    plain = FAMILY.build().train()
    with tokencomp.patch(plain, 0.5, **options):
        expected = grads_of(plain, loss_of(plain))
    model = FAMILY.build().train()
    layer = FAMILY.decoder(model).layers[0]
    wrapped = layer if part == "layers" else layer.self_attn
    if order == "wrap":
        wrap(model, wrapped, reentrant)
    handle = tokencomp.patch(model, 0.5, **options)
    if order != "wrap":
        wrap(model, wrapped, reentrant)
    loss = loss_of(model)
    if order == "unpatch":
        handle.remove()
    got = grads_of(model, loss)
    handle.remove()
    same(got, expected)


def replace_forward(module: Any, run: Callable[..., Any]) -> None:
    module.forward = functools.partial(run, module.forward)


def without_gradients(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The first run of reentrant checkpointing, whoever implements it."""
    with torch.no_grad():
        return function(*args, **kwargs)


def checkpoint_layers(model: Any) -> None:
    for layer in FAMILY.decoder(model).layers:
        replace_forward(layer, functools.partial(checkpoint, use_reentrant=False))


def checkpoint_attention(model: Any, run: Any = None) -> None:
    for layer in FAMILY.decoder(model).layers:
        replace_forward(layer.self_attn, run or functools.partial(checkpoint, use_reentrant=False))


def reentrant_attention(model: Any) -> None:
    checkpoint_attention(model, without_gradients)


def wrap_decoder(model: Any) -> None:
    model.model.language_model = checkpoint_wrapper(model.model.language_model)


def wrap_body(model: Any) -> None:
    model.model = checkpoint_wrapper(model.model)


def test_a_wrapped_decoder() -> None:
    """It is refused where a hook gives its rotary module the positions of kept tokens."""
    family = FAMILIES["llava_onevision"]
    model = family.build().train()
    wrap_decoder(model)
    with (
        tokencomp.patch(model, 0.5),
        pytest.raises(OptionError, match=r"(?s)positions of kept.*gradient_checkpointing_enable"),
    ):
        model(**family.batch([[text(3), family.image(0), text(6, 3)]]), use_cache=False)


@pytest.mark.parametrize(
    ("reducer", "change", "lost"),
    [
        ("auto", checkpoint_layers, "weights of merged tokens"),
        ("auto", checkpoint_attention, "weights of merged tokens"),
        ("auto", reentrant_attention, "weights of merged tokens"),
        ("fastv", wrap_decoder, "places of its media"),
        ("condiv", wrap_decoder, "places of its media"),
        ("fastv", wrap_body, "its labels"),
    ],
)
def test_what_would_be_compressed_otherwise_is_refused(
    reducer: str, change: Callable[[Any], None], lost: str
) -> None:
    model = FAMILY.build().train()
    tokencomp.patch(model, 0.5, reducer=reducer)
    change(model)
    with pytest.raises(OptionError, match=rf"(?s){lost}.*gradient_checkpointing_enable"):
        loss_of(model)
    tokencomp.unpatch(model)
    assert grads_of(model, loss_of(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_wrapped_blocks_of_a_tower(frozen: bool, reentrant: bool) -> None:
    """Wrapped before the patch they are exact; after it torch raises, unless they are frozen."""
    found: list[dict[str, Tensor]] = []
    for order in ("none", "wrap", "patch"):
        model: Any = FAMILY.build().train()
        tower = model.model.visual.requires_grad_(not frozen)
        if order == "wrap":
            wrap(tower, tower.blocks[0], reentrant)
        with tokencomp.patch(model, 0.5, tower_ratio=0.3):
            if order == "patch":
                wrap(tower, tower.blocks[0], reentrant)
            if order == "patch" and not frozen:
                with pytest.raises(RuntimeError):
                    grads_of(model, loss_of(model))
            else:
                found.append(grads_of(model, loss_of(model)))
    for got in found[1:]:
        same(got, found[0])


def test_a_checkpointed_body_without_labels() -> None:
    """Its backward pass compresses the prompt once more, and in the same way."""
    found = []
    for wrapped in (False, True):
        model = FAMILY.build().train()
        with tokencomp.patch(model, 0.5, reducer="fastv"):
            if wrapped:
                wrap_body(model)
            out = model(**FAMILY.batch(PROMPTS[1]), use_cache=False).logits
            found.append(grads_of(model, out.float().logsumexp(-1).sum()))
    same(*found)
