"""The split of time and the counts of memory against what can be known beforehand."""

from __future__ import annotations

from typing import Any

import pytest

import tokencomp
from tokencomp.evaluation import profiler
from tokencomp.evaluation.profiler import _gains
from tokencomp.evaluation.timing import Split, prefill_split
from tokencomp.inputs.prompts import build_inputs
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.uniform import Uniform


@pytest.fixture
def inputs(loaded, examples):
    return build_inputs(loaded[1], [examples[0].load(8)], [examples[0].prompt])


class Hand:
    """A clock whose hand the test moves, so that nothing depends on what the machine does."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def between(self, start: float, stop: float) -> float:
        return stop - start

    def finish(self) -> None:
        pass

    def move(self, seconds: float) -> None:
        self.now += seconds


def slow_reducer(reducer: type[Reducer], hand: Hand, seconds: float, monkeypatch) -> list[Any]:
    """Make every call of a reducer take longer; returns the list of its calls."""
    real, calls = reducer.reduce, []

    def reduce(self, tokens):
        calls.append(tokens.budgets)
        hand.move(seconds)
        return real(self, tokens)

    monkeypatch.setattr(reducer, "reduce", reduce)
    return calls


def test_time_is_booked_where_it_is_spent(loaded, inputs, monkeypatch):
    """Time passes in the vision tower, one decoder layer and the reducer; each shows up once."""
    model, hand = loaded[0], Hand()
    slow_reducer(Uniform, hand, 0.5, monkeypatch)
    modules = {model.model.visual: 4.0, model.model.language_model.layers[2].mlp: 2.0}
    hooks = [
        module.register_forward_pre_hook(lambda *_, seconds=seconds: hand.move(seconds))
        for module, seconds in modules.items()
    ]
    try:
        with tokencomp.patch(model, 0.5, reducer="uniform"):
            split = prefill_split(model, inputs, hand)
    finally:
        for hook in hooks:
            hook.remove()
    assert split == Split(vision=4, reduce=0.5, prefill=2, total=6.5)


def test_a_decode_step_is_timed_without_the_prefill(loaded, inputs, monkeypatch):
    """The prompt takes 8 s, and the steps 1, 2 and 3 s."""
    model, hand, seconds = loaded[0], Hand(), iter((8.0, 1.0, 2.0, 3.0))
    layer = model.model.language_model.layers[0]
    monkeypatch.setattr("torch.utils.benchmark.timer", hand.mark)
    with layer.register_forward_pre_hook(lambda *_: hand.move(next(seconds))):
        assert profiler.decode_seconds(model, inputs, 2) == 1.5  # the last step has no end


def test_a_speedup_pays_for_the_reducer():
    """Three seconds become one of the model and half a one of the reducer."""
    full = {"prefill_s": 3.0, "reduce_s": 0.0, "total_s": 4.0, "flops": 30}
    row = {"prefill_s": 1.0, "reduce_s": 0.5, "total_s": 2.0, "flops": 10}
    full |= {"preprocess_s": 1.0, "decode_s_per_token": 0.2}
    row |= {"preprocess_s": None, "decode_s_per_token": 0.1}
    gains = {"speedup": 2.0, "reduce_overhead": 0.5 / 3, "total_speedup": 2.0}
    found = _gains(row, full)
    assert {name: found[name] for name in gains} == pytest.approx(gains)
    # 1 + 4 s and 15 steps of 0.2 s become 2 s and 15 of 0.1 s.
    assert found["answers"][0] == pytest.approx(
        {"tokens": 16, "seconds": 3.5, "speedup": 8.0 / 3.5}
    )
