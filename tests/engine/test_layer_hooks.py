"""Hooks on layers are there in calls whose layers hold different rows, and in no others."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch
from support import oracle
from support.caches import LAYERS, ragged, single
from support.families import FAMILIES, Family
from transformers import LogitsProcessorList

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.call.layer_hooks import LayerHooks
from tokencomp.engine.call.state import RunningCalls
from tokencomp.errors import UnsupportedModelError

FAMILY = FAMILIES["qwen2_vl"]


def hooks(family: Family, model: Any) -> int:
    """Hooks on decoder layers and what is in them."""
    modules = family.decoder(model).layers.modules()
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


def hooks_by_call(model: Any, inputs: dict[str, Any], calls: int) -> list[int]:
    """How many hooks there are after every call of the model in `generate`, its prompt first."""
    seen = []

    def note(ids: Any, scores: Any) -> Any:
        seen.append(hooks(FAMILY, model))
        return scores

    oracle.generate(model, inputs, calls, logits_processor=LogitsProcessorList([note]))
    return seen


@pytest.mark.parametrize("reducer", ["fastv", "pyramiddrop", "aim"])
def test_decoding_finds_no_hooks(reducer: str) -> None:
    """A prompt installs them, the first token removes them, and the next prompt is compressed."""
    model, inputs = FAMILY.build(), single(FAMILY)
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle, torch.no_grad():
        first = model(**inputs).logits
        for _ in range(2):
            seen = hooks_by_call(model, inputs, 3)
            assert seen[0] >= len(FAMILY.decoder(model).layers) and seen[1:] == [0, 0]
        assert torch.equal(model(**inputs).logits, first)
        assert handle.stats and handle.stats.ratio > 0.4
    assert hooks(FAMILY, model) == 0


def test_padded_steps_keep_them() -> None:
    """Their masks differ by layer. A text prompt removes the hooks, and so does unpatch."""
    model = FAMILY.build()
    with tokencomp.patch(model, plan=LAYERS), torch.no_grad():
        seen = hooks_by_call(model, ragged(FAMILY), 3)
        assert min(seen) >= len(FAMILY.decoder(model).layers)
        model(torch.tensor([[5, 6, 7]]))
        assert hooks(FAMILY, model) == 0
        model(**ragged(FAMILY))
    assert hooks(FAMILY, model) == 0


def layer_hooks(model: Any) -> LayerHooks:
    own = LayerHooks(adapter_for(model), RunningCalls())
    own.install(LAYERS)
    return own


def test_another_thread_that_needs_them_keeps_them() -> None:
    model = FAMILY.build()
    own = layer_hooks(model)
    begun, end = threading.Event(), threading.Event()

    def call() -> None:
        own.prepare(True, False)
        begun.set()
        end.wait(10)
        own.finish()

    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(10)
    own.prepare(False, False)
    assert hooks(FAMILY, model) == len(FAMILY.decoder(model).layers)
    end.set()
    thread.join()
    own.prepare(False, False)
    assert hooks(FAMILY, model) == 0


def test_a_thread_that_has_died_keeps_nothing() -> None:
    model = FAMILY.build()
    own = layer_hooks(model)
    dead = threading.Thread(target=own.prepare, args=(True, False))
    dead.start()
    dead.join()
    assert hooks(FAMILY, model) > 0
    own.prepare(False, False)
    assert hooks(FAMILY, model) == 0


def test_threads_that_decode_beside_prompts() -> None:
    """Hooks come and go while other threads run; every answer is that of one thread alone."""
    model, prompts = FAMILY.build(), [single(FAMILY), ragged(FAMILY), single(FAMILY, 1)]
    with tokencomp.patch(model, 0.5, reducer="fastv"):
        expected = [oracle.generate(model, inputs, 6).sequences for inputs in prompts]
        errors: list[Exception] = []

        def run(number: int) -> None:
            try:
                for _ in range(4):
                    out = oracle.generate(model, prompts[number], 6).sequences
                    assert torch.equal(out, expected[number])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number % 3,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]


def test_a_hook_on_its_way_out_gets_no_keyword_arguments() -> None:
    """torch looks twice where a hook is; in between, another thread may remove it."""
    model = FAMILY.build()
    with tokencomp.patch(model, 0.5, reducer="fastv") as handle:
        plan = handle.plan
    own = LayerHooks(adapter_for(model), RunningCalls())
    own.install(plan)
    own.prepare(True, False)
    own.calls.state.forward = object()
    before = [(m, hook) for m in model.modules() for hook in m._forward_pre_hooks.values()]
    after = [(m, hook) for m in model.modules() for hook in m._forward_hooks.values()]
    assert len(before) == len(FAMILY.decoder(model).layers) and after
    assert all(hook(module, ()) is None for module, hook in before)
    assert all(hook(module, (), torch.zeros(1)) is None for module, hook in after)


def test_layers_without_their_hooks_are_an_error() -> None:
    """What torch.compile made before there were hooks does not run a prompt uncompressed."""
    model = FAMILY.build()
    with (
        tokencomp.patch(model, plan=LAYERS),
        mock.patch.object(LayerHooks, "_hook"),
        pytest.raises(UnsupportedModelError, match=r"torch\.compile"),
    ):
        model(**single(FAMILY))


@pytest.mark.parametrize("inputs", [single(FAMILY), ragged(FAMILY)], ids=["single", "ragged"])
def test_queries_are_projected_once(inputs: dict[str, torch.Tensor]) -> None:
    """PageRank takes them from the attention call that has run, and keeps the same tokens."""
    model, calls = FAMILY.build(), []
    for layer in FAMILY.decoder(model).layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, *_: calls.append(module))
    with tokencomp.patch(model, 0.5, reducer="prune"), torch.no_grad():
        logits = model(**inputs).logits
        assert len(calls) == len(set(calls)) == len(FAMILY.decoder(model).layers)
    unseen = mock.patch.object(LayerHooks, "_note", return_value=None)
    with unseen, tokencomp.patch(model, 0.5, reducer="prune"), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
        assert len(calls) > 2 * len(set(calls))
