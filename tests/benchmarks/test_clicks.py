"""Clicks of a model that always knows the target, on whole screens and after a zoom."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.clicks.__main__ import LOOKS, Look, ask
from recipes.clicks.screens import BINS, SCREEN, Question, Screen

SHADE = 90


def screens() -> list[Screen]:
    """Two screens with two targets each, dark squares that cover the whole of their boxes."""
    made = []
    for corners in (((30, 40), (400, 500)), ((529, 5), (210, 290))):
        picture = np.full((SCREEN, SCREEN, 3), 255, np.uint8)
        asked = []
        for number, (left, top) in enumerate(corners):
            picture[top : top + 30, left : left + 30] = SHADE * number
            box = (left, top, left + 30, top + 30)
            asked.append(Question("click-color", f"Click on {SHADE * number}.", (box,)))
        made.append(Screen(picture, tuple(asked), ()))
    return made


def seeing(pictures: list[Image.Image], texts: list[str], budget: int | None) -> list[Any]:
    """The bins of the target in what is shown, found by its shade; None: not in the picture."""
    out: list[Any] = []
    for picture, text in zip(pictures, texts, strict=True):
        gray = np.asarray(picture.convert("L")).astype(int)
        shade = int(text.removeprefix("Click on ").removesuffix("."))
        rows, columns = np.nonzero(abs(gray - shade) < 20)
        middle = (np.median(columns), np.median(rows)) if len(rows) else None
        out.append(middle and tuple(int(BINS * (v + 0.5) / len(gray)) for v in middle))
    return out


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.name)
def test_an_answer_on_the_target_is_a_right_click(look: Look) -> None:
    made = screens()
    clicks = ask(seeing, made, [look.first, look])[look]  # type: ignore[arg-type]
    asked = [question for screen in made for question in screen.questions]
    assert [q.hit(*at) for q, at in zip(asked, clicks, strict=True)] == [True] * 4


def test_a_first_click_elsewhere_leads_to_another_quarter() -> None:
    def astray(pictures: list[Any], texts: list[str], budget: int | None) -> list[Any]:
        if budget is None:  # the second look
            return seeing(pictures, texts, None)
        return [(0, 0)] * len(texts)

    look = Look(20, 100, zoom=True)
    clicks = ask(astray, screens(), [look.first, look])[look]  # type: ignore[arg-type]
    assert [at is not None for at in clicks] == [True, False, False, False]
