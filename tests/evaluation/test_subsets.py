"""`random` as a baseline: a subset per question, however the questions are batched."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tokencomp.evaluation import Setting, batches, patches, sweep
from tokencomp.evaluation.patches import Subsets
from tokencomp.tokens.tokens import Tokens
from tokencomp.training.measure import Measurement

HOW = {"max_new_tokens": 2, "progress": False}
RANDOM = Setting("random", 0.75)


def kept(reducer: Any, place: tuple[int, int], keep: int = 6) -> tuple[int, ...]:
    tokens = Tokens(torch.zeros(64, 4), [(1, 8, 8)], [keep], places=[place])
    return tuple(reducer.reduce(tokens).rows.tolist())


@pytest.mark.long
def test_every_question_and_span_draws_as_often_everywhere() -> None:
    """5000 draws of 6 of 64: every place is drawn 469 ± 21 times (binomial, five sigma)."""
    names = tuple(map(str, range(2500)))
    drawn = [kept(Subsets(names=names), (b, j)) for b in range(2500) for j in range(2)]
    assert len(set(drawn)) > 4990 and {len(set(one)) for one in drawn} == {6}
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=64).double()
    assert (counts - 5000 * 6 / 64).abs().max() < 5 * (5000 * 6 / 64 * 58 / 64) ** 0.5
    assert kept(Subsets(names=("x", "7")), (1, 0)) == drawn[14]
    assert kept(Subsets(names=("7",), seed=1), (0, 0)) != drawn[14]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Kept places by name of the question."""
    places: dict[str, tuple[int, ...]] = {}

    class Spying(patches.PatchedModels):
        @contextlib.contextmanager
        def applied(self, setting: Setting, names: Any) -> Any:
            with super().applied(setting, names) as handle:
                yield handle
                if handle is not None:
                    assert handle.plan.stages[0].reducer.names == tuple(names)
                    kept = [tuple(handle.stats.kept(b)[0][0]) for b in range(len(names))]
                    places.update(zip(names, kept, strict=True))

    monkeypatch.setattr(batches, "PatchedModels", Spying)
    return places


def test_batches_halves_and_resumption_change_nothing(loaded, examples, seen, tmp_path) -> None:
    images = [e for e in examples if e.media[0].suffix != ".mp4"]
    assert len(images) > 1
    sweep(*loaded, images, [RANDOM], batch_size=len(images), **HOW)
    first = dict(seen)
    assert first.keys() == {e.id for e in images} and len(set(first.values())) == len(images)
    for size in (1, len(images) - 1):
        seen.clear()
        sweep(*loaded, images, [RANDOM], batch_size=size, **HOW)
        assert seen == first
    sweep(*loaded, images[:1], [RANDOM], tmp_path, **HOW)
    seen.clear()
    sweep(*loaded, images, [RANDOM], tmp_path, **HOW)
    assert seen == {e.id: first[e.id] for e in images[1:]}
    seen.clear()
    measured = Measurement({"": loaded[0]}, loaded[1], batch=len(images), max_new_tokens=2)
    measured.run(images, [RANDOM])
    assert seen == first
