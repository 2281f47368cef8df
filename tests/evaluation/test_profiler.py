"""The split of time and the counts of memory against what can be known beforehand."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import tokencomp
from tokencomp.evaluation.profiler import PeakMemory, decode_seconds
from tokencomp.evaluation.timing import Split, interleaved, prefill_split
from tokencomp.evaluation.work import FlopClock
from tokencomp.inputs.prompts import build_inputs


@pytest.fixture
def inputs(loaded, examples):
    return build_inputs(loaded[1], [examples[0].load(8)], [examples[0].prompt])


def slow(module: nn.Module, seconds: float):
    """Make every forward of a module take longer."""
    return module.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_time_is_booked_where_it_is_spent(loaded, inputs, monkeypatch):
    """Sleep in the vision tower, in one decoder layer and in the reducer; each shows up once."""
    from tokencomp.reducers.uniform import Uniform

    model = loaded[0]
    plain = prefill_split(model, inputs)
    real = Uniform.reduce_batch

    def reduce_batch(self, batch, keeps):
        time.sleep(0.4)
        return real(self, batch, keeps)

    monkeypatch.setattr(Uniform, "reduce_batch", reduce_batch)
    hooks = [slow(model.model.visual, 1.2), slow(model.model.language_model.layers[2].mlp, 0.8)]
    try:
        with tokencomp.patch(model, 0.5, reducer="uniform"):
            split = prefill_split(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert 1.2 <= split.vision < 1.2 + 0.35 + plain.vision
    assert 0.4 <= split.reduce < 0.75
    assert 0.8 <= split.prefill < 0.8 + 0.35 + plain.prefill
    assert split.total >= split.vision + split.llm - 1e-3


def test_layer_stages_count_as_reducing(loaded, inputs, monkeypatch):
    from tokencomp.reducers.prune import Prune

    real, calls = Prune.reduce_batch, []

    def reduce_batch(self, batch, keeps):
        calls.append(keeps)
        time.sleep(0.2)
        return real(self, batch, keeps)

    monkeypatch.setattr(Prune, "reduce_batch", reduce_batch)
    with tokencomp.patch(loaded[0], 0.5, reducer="prune"):
        split = prefill_split(loaded[0], inputs)
    assert calls and split.reduce >= 0.2 * len(calls)
    assert split.prefill < 0.2 * len(calls) + 1.0


def test_an_unpatched_model_spends_nothing_on_reducing(loaded, inputs):
    """In floating-point operations, which do not depend on what else the machine does."""
    for ratio in (0.0, 0.5):
        with tokencomp.patch(loaded[0], ratio, reducer="divprune"), FlopClock() as clock:
            split = prefill_split(loaded[0], inputs, clock)
        assert (split.reduce > 0) == (ratio > 0) and split.prefill > 0
    with FlopClock() as clock:
        assert prefill_split(loaded[0], inputs, clock).reduce == 0


def test_hooks_are_gone_afterwards(loaded, inputs):
    count = lambda: sum(  # noqa: E731
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded[0].modules()
    )
    before = count()
    prefill_split(loaded[0], inputs)
    decode_seconds(loaded[0], inputs, 2)
    assert count() == before


def test_variants_alternate_and_medians_are_taken():
    order = []
    values = {"a": iter([9, 1, 5, 2]), "b": iter([9, 7, 8, 6])}

    def variant(name):
        def run():
            order.append(name)
            value = next(values[name])
            return Split(value, value, value, value)

        return run

    found = interleaved({n: variant(n) for n in "ab"}, rounds=3)
    assert "".join(order) == "abababab"
    assert found["a"] == Split(2, 2, 2, 2) and found["b"] == Split(7, 7, 7, 7)


def test_peak_memory_sees_a_temporary_tensor():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(32, 1 << 20).sum()
    if peak.bytes is None:
        pytest.skip("the system does not tell peak memory")
    assert 100 * 2**20 <= peak.bytes <= 400 * 2**20
