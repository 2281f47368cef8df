"""Activation checkpointing that is not transformers' own: the same gradients, or an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import FAMILIES, text
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import tokencomp
from tokencomp.errors import OptionError

FAMILY = FAMILIES["qwen2_vl"]
PROMPTS = (
    [[text(3), FAMILY.image(0), text(6, 3)], [text(9)]],
    [[text(2), FAMILY.image(1), text(7, 4)], [text(5), FAMILY.image(0), text(8, 2)]],
)
PREFIX = "_checkpoint_wrapped_module."


def loss_of(model: nn.Module) -> Tensor:
    """Of two calls, whose layers run again after both have run."""
    losses = []
    for rows in PROMPTS:
        inputs = FAMILY.batch(rows)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -4:] = inputs["input_ids"][:, -4:]
        losses.append(model(**inputs, labels=labels, use_cache=False).loss)
    return losses[0] + losses[1]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = model.named_parameters()
    return {n.replace(PREFIX, ""): p.grad.clone() for n, p in named if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def wrap(model: nn.Module, part: str, reentrant: bool) -> None:
    """Wrap decoder layers, or their attention, as FSDP's activation checkpointing does."""
    layer = FAMILY.decoder(model).layers[0]
    wrap_all(model, type(layer if part == "layers" else layer.self_attn), reentrant)


def wrap_blocks(tower: Any, reentrant: bool) -> None:
    wrap_all(tower, type(tower.blocks[0]), reentrant)


def wrap_all(model: nn.Module, kind: type, reentrant: bool) -> None:
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
        expected = gradients(plain, loss_of(plain))
    model = FAMILY.build().train()
    if order == "wrap":
        wrap(model, part, reentrant)
    handle = tokencomp.patch(model, 0.5, **options)
    if order != "wrap":
        wrap(model, part, reentrant)
    loss = loss_of(model)
    if order == "unpatch":
        handle.remove()
    got = gradients(model, loss)
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
    assert gradients(model, loss_of(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_wrapped_blocks_of_a_tower(frozen: bool, reentrant: bool) -> None:
    """Wrapped before the patch they are exact; behind it they are refused, unless frozen."""
    found: list[dict[str, Tensor]] = []
    for order in ("none", "wrap", "patch"):
        model: Any = FAMILY.build().train()
        tower = model.model.visual.requires_grad_(not frozen)
        if order == "wrap":
            wrap_blocks(tower, reentrant)
        with tokencomp.patch(model, 0.5, tower_ratio=0.3):
            if order == "patch":
                wrap_blocks(tower, reentrant)
            if order == "patch" and not frozen:
                with pytest.raises(OptionError, match="before patch"):
                    loss_of(model)
            else:
                found.append(gradients(model, loss_of(model)))
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
            found.append(gradients(model, out.float().logsumexp(-1).sum()))
    same(*found)
