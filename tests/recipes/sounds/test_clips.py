"""Questions about sounds: answers follow from the samples, and splits differ."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.sounds.items import items
from recipes.sounds.questions import FAMILIES, NUMBERS, ORDER
from recipes.sounds.scenes import RATE, SECONDS, Clip, render

WINDOW = 0.01  # s


def loud_spans(samples: np.ndarray) -> list[tuple[float, float]]:
    """When something louder than the noise is heard, in seconds, from the samples alone.

    Shorter gaps than 0.12 s stand between the clicks of a rattle.
    """
    power = np.sqrt((samples.reshape(-1, int(RATE * WINDOW)) ** 2).mean(1))
    loud = np.flatnonzero(power > 2.5 * np.quantile(power, 0.05))
    parts = np.split(loud, np.flatnonzero(np.diff(loud) > 0.12 / WINDOW) + 1)
    return [(p[0] * WINDOW, (p[-1] + 1) * WINDOW) for p in parts]


def name_at(clip: Clip, span: tuple[float, float]) -> str:
    """Name of the sound at a time: what the samples cannot say without a model."""
    middle = sum(span) / 2
    return next(s.name for s in clip.sounds if s.start <= middle < s.end)


@pytest.mark.parametrize("group", FAMILIES)
def test_answers_follow_from_what_is_heard(group: str) -> None:
    answers = set()
    for one in (i for i in items("validation", 20) if i.family == group):
        (samples,) = one.example().source()
        spans, words = loud_spans(samples), one.question.rstrip("?").split()
        names = [name_at(one.clip, span) for span in spans]
        if group == "existence":
            expected = "yes" if words[-1] in names else "no"
        elif group == "count":
            expected = NUMBERS[len(spans) - 1]
        elif group == "place":
            expected = names[-1 if words[-1] == "last" else ORDER.index(words[-1])]
        elif group == "after":
            expected = names[names.index(words[-1]) + 1]
        elif group == "half":
            expected = "first" if spans[names.index(words[2])][1] <= SECONDS / 2 else "second"
        else:
            expected = names[int(np.argmax([end - start for start, end in spans]))]
        assert one.answer == expected and one.answer in one.options
        answers.add(one.answer)
    assert len(answers) >= 2


def test_clips_differ_between_splits_and_are_repeated_exactly() -> None:
    splits = [[i.clip for i in items(s, 3)] for s in ("train", "validation", "test", "test")]
    assert splits[2] == splits[3]
    assert len({c for some in splits for c in some}) == 3 * len(splits[0])
    assert (render(splits[2][0]) == render(splits[3][0])).all()
    assert render(splits[2][0]).shape == (RATE * SECONDS,)
