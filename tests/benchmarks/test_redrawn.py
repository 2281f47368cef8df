"""Pictures drawn in another way show the facts of their scenes: found again by drawing without."""

import colorsys
from dataclasses import replace

import numpy as np
from PIL import ImageDraw

from benchmarks.long.redrawn import draw, redrawn
from tokencomp.zoo.shapesqa.facts import PLACES
from tokencomp.zoo.shapesqa.long_scenes import item
from tokencomp.zoo.shapesqa.render import HUES


def pixels(scene):
    return np.asarray(draw(scene), int)


def changed(scene, other):
    """Where two pictures differ, bool (height, width)."""
    return np.abs(pixels(scene) - pixels(other)).max(-1) > 40


def test_objects_have_their_place_size_and_color():
    for one in (item("train", "describe", k) for k in range(8)):
        (scene,) = one.scenes
        for number, fact in enumerate(one.facts):
            rest = (*scene.things[:number], *scene.things[number + 1 :])
            inked = changed(scene, replace(scene, things=rest))
            y, x = inked.nonzero()
            row = int((y.min() + y.max()) / 2 * 4 / scene.height)
            column = int((x.min() + x.max()) / 2 * 3 / scene.width)
            assert PLACES[3 * row + column] == fact.key
            size, color, _ = fact.value.split()
            assert size == ("small" if max(np.ptp(y), np.ptp(x)) < 31 else "large")
            shown = pixels(scene)[inked]
            colored = np.ptp(shown, axis=1)  # less in shadows and outlines
            rgb = np.median(shown[colored > 0.8 * colored.max()], 0) / 255
            hue = 360 * colorsys.rgb_to_hsv(*rgb)[0]
            off = {name: abs((hue - at + 180) % 360 - 180) for name, at in HUES.items()}
            assert min(off, key=off.get) == color


def test_words_are_in_reading_order(monkeypatch):
    drawn = []

    def record(self, xy, text, font, anchor, **_):
        drawn.append((xy[1], xy[0], text, font.getbbox(text, anchor=anchor)))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    for one in (item("train", "read", k) for k in range(8)):
        drawn.clear()
        draw(one.scenes[0])
        assert [text for *_, text, _ in sorted(drawn)] == one.answer.split()
        taken = np.zeros((one.scenes[0].height, one.scenes[0].width), int)
        for y, x, _, (left, top, right, bottom) in drawn:
            assert x + left >= 0 and x + right <= taken.shape[1]
            assert y + top >= 0 and y + bottom <= taken.shape[0]
            taken[int(y + top) : int(y + bottom), int(x + left) : int(x + right)] += 1
        assert taken.max() == 1


def test_pictures_of_a_pair_differ_in_the_places_of_their_facts():
    for one in (item("train", "compare", k) for k in range(6)):
        first, second = (np.asarray(x, int) for x in redrawn(one).media())
        high, wide = first.shape[0] / 4, first.shape[1] / 3
        found = set()
        for number, name in enumerate(PLACES):
            top, left = (number // 3 + 0.25) * high, (number % 3 + 0.25) * wide
            part = np.s_[int(top) : int(top + high / 2), int(left) : int(left + wide / 2)]
            if (np.abs(first[part] - second[part]).max(-1) > 40).mean() > 0.02:
                found.add(name)
        assert found == {fact.key for fact in one.facts}
