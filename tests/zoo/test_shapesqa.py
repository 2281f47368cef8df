"""ShapesQA: determinism, disjoint splits, free positions, and answers derived again by parsing."""

import re
from itertools import product

import numpy as np
import pytest

from recipes.tiny.labels import owner_map
from tokencomp.errors import UnknownNameError
from tokencomp.zoo.shapesqa.items import SPLIT_SEEDS, item, items, stream
from tokencomp.zoo.shapesqa.questions import IMAGE_FAMILIES, PLURALS, VIDEO_FAMILIES
from tokencomp.zoo.shapesqa.render import render
from tokencomp.zoo.shapesqa.scenes import COLORS, SHAPES

EVERY = (*IMAGE_FAMILIES, *VIDEO_FAMILIES, "video_existence")
STILL = ("attribute", "existence", "count", "position")


def test_items_are_deterministic():
    for family in EVERY:
        first, second = item("train", family, 3), item("train", family, 3)
        assert first.scene == second.scene and first.query == second.query
        assert np.array_equal(first.pixels(), second.pixels())


def test_splits_are_disjoint():
    scenes = {
        split: {repr(one.scene) for one in items(split, 30, ("attribute", "needle"))}
        for split in SPLIT_SEEDS
    }
    for a, b in product(scenes, scenes):
        if a != b:
            assert not scenes[a] & scenes[b]
    draws = [tuple(stream(split, 7, 1).integers(0, 2**62, 4)) for split in SPLIT_SEEDS]
    assert len(set(draws)) == len(draws)


def test_difficulties_are_disjoint_and_named():
    """Same split, family and index, another difficulty: another scene and another id."""
    for family in STILL:
        three = [item("test", family, 3, difficulty=d) for d in ("plain", "usual", "hard")]
        assert len({one.id for one in three}) == 3
        assert len({repr(one.scene.things) for one in three}) == 3
    with pytest.raises(UnknownNameError, match="plain"):
        item("test", "count", 0, difficulty="easy")
    with pytest.raises(UnknownNameError, match="attribute"):
        item("test", "needle", 0, difficulty="plain")


@pytest.mark.parametrize("difficulty", ["usual", "hard"])
def test_text_stands_where_the_scene_says(difficulty):
    """The picture differs from the same scene without text in the text's box alone."""
    from dataclasses import replace

    for one in items("test", 8, ("reading",), difficulty=difficulty):
        (text,) = one.scene.texts
        assert one.answer == text.text and one.answer in one.options
        assert len(set(one.options)) == 4
        changed = (one.pixels() != render(replace(one.scene, texts=()))).any((0, 3))
        left, top, right, bottom = text.box
        rows, columns = np.nonzero(changed)
        assert left - 2 <= columns.min() and columns.max() <= right + 2
        assert top - 2 <= rows.min() and rows.max() <= bottom + 2
        for thing in one.scene.things:
            a = thing.box()
            assert a[2] <= left or right <= a[0] or a[3] <= top or bottom <= a[1]


def _in_frame(scene, time):
    """Indices that a viewer sees at one time, read off the rendered ownership alone."""
    return set(np.unique(owner_map(scene, time)).tolist()) - {-1}


def _starts(scene, index):
    """First logical frame of each appearance, found by looking at every frame."""
    shown = [index in _in_frame(scene, frame) for frame in range(scene.frames)]
    return [k for k in range(scene.frames) if shown[k] and not (k and shown[k - 1])]


def _find(scene, **words):
    return [
        i
        for i, thing in enumerate(scene.things)
        if all(getattr(thing, key) == word for key, word in words.items())
    ]


def _centroid(scene, index, time=0.0):
    y, x = np.nonzero(owner_map(scene, time) == index)
    return float(x.mean()), float(y.mean())


def _solve_image(scene, text):
    words = re.findall(r"[a-z]+", text.lower())
    singular = {plural: shape for shape, plural in PLURALS.items()}
    shapes = [singular.get(w, w) for w in words if singular.get(w, w) in SHAPES]
    colors = [w for w in words if w in COLORS]
    if text.startswith("Is there"):
        return "yes" if _find(scene, color=colors[0], shape=shapes[0]) else "no"
    if text.startswith("How many") and "flash" not in text:
        keys = {"color": colors[0]} if colors else {"shape": shapes[0]} if shapes else {}
        return str(len(_find(scene, **keys)))
    if text.startswith("What"):
        small = {i for i, t in enumerate(scene.things) if max(t.size, t.size) < 28}
        found = _find(scene, shape=shapes[0]) if shapes else _find(scene, color=colors[0])
        if "small" in words:
            found = [i for i in found if i in small]
        assert len(found) == 1, "ambiguous"
        return scene.things[found[0]].color if shapes else scene.things[found[0]].shape
    places = [_centroid(scene, _find(scene, shape=shape)[0]) for shape in shapes]
    assert all(len(_find(scene, shape=shape)) == 1 for shape in shapes), "ambiguous"
    axis = 0 if "left" in words else 1
    names = ("left", "right") if axis == 0 else ("top", "bottom")
    if "half" in words:
        return names[places[0][axis] > (scene.width, scene.height)[axis] / 2]
    names = ("left", "right") if axis == 0 else ("above", "below")
    return names[places[0][axis] > places[1][axis]]


def _solve_video(scene, text):
    words = re.findall(r"[a-z]+", text.lower())
    shapes, colors = [w for w in words if w in SHAPES], [w for w in words if w in COLORS]
    if "direction" in words:
        (index,) = _find(scene, shape=shapes[0])
        (x0, y0), (x1, y1) = (_centroid(scene, index, t) for t in (0, scene.frames - 1))
        if abs(x1 - x0) > abs(y1 - y0):
            return "right" if x1 > x0 else "left"
        return "down" if y1 > y0 else "up"
    if "flash" in words:
        (index,) = _find(scene, shape=shapes[0])
        return str(len(_starts(scene, index)))
    if "before" in words:
        a, b = (_starts(scene, _find(scene, shape=s)[0])[0] for s in shapes)
        return "before" if a < b else "after"
    if "appears" in words:
        key = "shape" if shapes else "color"
        names = shapes or colors
        when = [_starts(scene, _find(scene, **{key: name})[0])[0] for name in names]
        return names[int(np.argmin(when) if "first" in words else np.argmax(when))]
    return _solve_image(scene, text)


CASES = [("usual", kind) for kind in EVERY] + [("hard", kind) for kind in EVERY]


@pytest.mark.parametrize(("difficulty", "kind"), CASES + [("plain", kind) for kind in STILL])
def test_answers_rederived(difficulty, kind):
    solve = _solve_image if kind in IMAGE_FAMILIES else _solve_video
    answers = set()
    for one in items(
        "validation", 40 if difficulty == "usual" else 15, (kind,), difficulty=difficulty
    ):
        assert solve(one.scene, one.question) == one.answer, (one.id, one.question)
        assert one.answer in one.options and len(set(one.options)) == len(one.options)
        assert one.options["ABCDE".index(one.letter)] == one.answer
        assert " " not in one.answer and 2 <= len(one.options) <= 4
        answers.add(one.answer)
    assert len(answers) > 1
