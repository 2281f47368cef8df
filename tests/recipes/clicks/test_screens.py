"""Screens of several pages: right clicks are where the targets are seen."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.clicks.pages import SCALE, SIDE
from recipes.clicks.screens import BINS, SCREEN, Pages, bins, pixel, questions
from tokencomp.inputs.zoom import Region

TASKS = ("click-button", "click-link", "click-tab", "click-color")


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    """Two white pages of each task, with one element of a colour that no other page has."""
    rng = np.random.default_rng(0)
    side = round(SCALE * SIDE)
    facts, pictures = [], []
    for number in range(2 * len(TASKS)):
        left, top = (int(v) for v in rng.integers(0, SIDE - 40, 2))
        box = left, top, left + 30, top + 20
        picture = np.full((side, side, 3), 255, np.uint8)
        x0, y0, x1, y1 = (round(SCALE * v) for v in box)
        picture[y0:y1, x0:x1] = 20 * number
        task = TASKS[number % len(TASKS)]
        facts.append([task, f"Click on {20 * number}.", [["BUTTON ", "", *box, True]]])
        pictures.append(picture)
    np.savez(tmp_path / "some.npz", facts=json.dumps(facts), pictures=np.stack(pictures))
    return Pages(tmp_path / "some.npz")


def test_every_target_is_inside_its_box(pages: Pages) -> None:
    screens = [*pages.fixed()]
    asked = [question for screen in screens for question in screen.questions]
    assert sorted(q.task for q in asked) == sorted(2 * TASKS)
    for screen in screens:
        assert len({q.task for q in screen.questions}) == 4
        for question in screen.questions:
            ((left, top, right, bottom),) = question.boxes
            x, y = int((left + right) / 2), int((top + bottom) / 2)
            shade = int(question.text.removeprefix("Click on ").removesuffix("."))
            assert (screen.picture[y, x] == shade).all()
            assert question.hit(x, y) and not question.hit(right + 2, y)


@pytest.mark.parametrize("region", [Region(0, 0, SCREEN, SCREEN), Region(280, 140, 280, 280)])
def test_an_answer_leads_back_to_its_target(region: Region) -> None:
    rng = np.random.default_rng(1)
    for x, y in rng.uniform(region.left + 20, region.left + 260, (50, 2)):
        y = region.top + (y - region.left)
        found = pixel(bins((x - 9, y - 9, x + 9, y + 9), region), region)
        assert max(abs(found[0] - x), abs(found[1] - y)) <= region.width / BINS


def test_the_right_element_and_others_of_its_kind() -> None:
    elements = [
        ["BUTTON ", "ok", 10, 10, 40, 30, True],
        ["BUTTON ", "no", 50, 10, 80, 30, False],
        ["DIV ", "text", 0, 40, 80, 60, False],
    ]
    made = questions("click-button", 'Click on the "ok" button.', elements)
    assert [(q.text, q.boxes) for q in made] == [
        ('Click on the "ok" button.', ((10, 10, 40, 30),)),
        ('Click on the "no" button.', ((50, 10, 80, 30),)),
    ]
