"""`random` as a baseline: a subset per question, the same again when asked again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokencomp
from tokencomp.context import VisualTokens
from tokencomp.evaluation import Setting, runner, sweep
from tokencomp.evaluation.subsets import Subsets, per_question
from tokencomp.training.measure import Measurement, Way


def kept(reducer: Any, calls: int, keep: int = 6) -> list[tuple[int, ...]]:
    tokens = VisualTokens(torch.zeros(64, 4), (1, 8, 8), torch.zeros(64, dtype=torch.bool))
    return [tuple(reducer.reduce(tokens, keep).keep.tolist()) for _ in range(calls)]


def test_every_call_draws_anew_and_as_often_everywhere() -> None:
    """5000 draws of 6 of 64: every place is drawn 469 ± 21 times (binomial, five sigma)."""
    drawn = kept(Subsets(key="a"), 5000)
    assert len(set(drawn)) > 4990 and {len(set(one)) for one in drawn} == {6}
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=64).double()
    assert (counts - 5000 * 6 / 64).abs().max() < 5 * (5000 * 6 / 64 * 58 / 64) ** 0.5
    assert kept(Subsets(key="a"), 20) == drawn[:20]
    for other in (Subsets(key="b"), Subsets(key="a", seed=1)):
        assert not set(kept(other, 20)) & set(drawn[:20])


def test_only_random_is_asked_that_way() -> None:
    request = {"ratio": 0.5, "reducer": "merge", "weighted": False}
    assert per_question(request, "a") is request
    made = per_question({"ratio": 0.5, "reducer": "random", "seed": 3}, "a")
    assert made == {"ratio": 0.5, "reducer": Subsets(seed=3, key="a")}
    assert Setting("random", 0.5).method != repr(tokencomp.make_reducer("random"))


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kept places of every span, as the runs go along."""
    seen: list[Any] = []
    patch = tokencomp.patch

    def spying(model: Any, *args: Any, **options: Any) -> Any:
        handle = patch(model, *args, **options)
        inner = handle.remove

        def remove() -> None:
            if handle.stats is not None:
                samples = range(len(handle.stats.spans))
                seen.extend(tuple(handle.stats.kept(b)[0][0]) for b in samples)
            inner()

        handle.remove = remove
        return handle

    monkeypatch.setattr(tokencomp, "patch", spying)
    return seen


def test_questions_of_a_sweep_and_of_a_measurement(loaded, examples, positions) -> None:
    images = [e for e in examples if e.media[0].suffix != ".mp4"]
    assert len(images) > 1
    how = {"max_new_tokens": 2, "progress": False}
    sweep(*loaded, images, [Setting("random", 0.75)], batch_size=len(images), **how)
    first = positions.copy()
    assert len(set(first)) == len(first) == len(images)
    sweep(*loaded, images, [Setting("random", 0.75)], batch_size=len(images), **how)
    assert positions[len(first) :] == first
    positions.clear()
    measured = Measurement({"": loaded[0]}, loaded[1], batch=len(images), max_new_tokens=2)
    measured.run(images, [Way("random", 0.75, "random")])
    assert positions == first
    with runner.patched(loaded[0], Setting("random", 0.75)) as handle:
        assert type(handle.plan.stages[0].reducer).__name__ == "Random"
