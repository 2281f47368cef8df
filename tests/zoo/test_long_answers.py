"""Long answers: facts agree with the pixels, parsers read what is written, alignments are best."""

import itertools

import numpy as np
import pytest

from tokencomp.zoo.shapesqa.facts import (
    PLACES,
    SUM,
    Fact,
    alignment,
    compare,
    read,
    write,
)
from tokencomp.zoo.shapesqa.long_scenes import FAMILIES, item
from tokencomp.zoo.shapesqa.render import HUES, render
from tokencomp.zoo.shapesqa.scenes import Scene

SAID = {
    "describe": (
        "top left: a small red cross; lower center: a large blue ring.",
        [("top left", "small red cross"), ("lower center", "large blue ring")],
    ),
    "count": (
        "1, top left: a small red cross; 2, bottom right: a large red star; so 2.",
        [("top left", "small red cross"), ("bottom right", "large red star"), (SUM, "2")],
    ),
    "follow": (
        "0 s, top left: the red circle moves up; 12 s, upper right: the pink ring flashes.",
        [
            ("0", "top left: the red circle moves up"),
            ("12", "upper right: the pink ring flashes"),
        ],
    ),
    "compare": (
        "top left: the red cross is gone; top right: the blue ring is now a star; "
        "lower left: the pink star is now cyan; bottom left: the red ring is new.",
        [
            ("top left", "the red cross is gone"),
            ("top right", "the blue ring is now a star"),
            ("lower left", "the pink star is now cyan"),
            ("bottom left", "the red ring is new"),
        ],
    ),
    "read": ("cat dog\nbox", [("0", "cat"), ("1", "dog"), ("2", "box")]),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_are_read_as_a_person_reads_them(kind):
    text, facts = SAID[kind]
    assert [(f.key, f.value) for f in read(kind, text)] == facts
    assert write(kind, [Fact(*one) for one in facts]).split() == text.split()


@pytest.mark.parametrize(
    "text", ["", ".", "top left: a small red", "1, : so so 3; 4;;", "the cat sat.", "so."]
)
def test_clauses_in_no_known_form_are_facts_that_no_scene_has(text):
    for family in ("describe", "count", "follow", "compare"):
        reference = item("validation", family, 0).facts
        found = compare(family, reference, read(family, text))
        assert not any(found.kept) and not any(found.changed) and all(found.left_out)
        assert found.invented == sum(bool(p.strip()) for p in text.rstrip(".").split(";"))


def test_a_comparison_counts_as_by_hand():
    said = (
        "upper left: a small red star; top left: a small red cross; top left: a large pink star; "
        "upper right: a large red ring; bottom left: a small cyan star"
    )
    reference = [
        Fact("top left", "small red cross"),  # kept, after the next one
        Fact("upper left", "small red star"),  # kept
        Fact("upper right", "large blue ring"),  # changed
        Fact("lower left", "large blue ring"),  # left out
    ]
    found = compare("describe", reference, read("describe", said))
    assert found.kept == (True, True, False, False)
    assert found.changed == (False, False, True, False)
    assert found.left_out == (False, False, False, True)
    assert found.invented == 2  # the second "top left", and "bottom left"
    assert found.ordered == (False,)


def every_alignment(a, b):
    """All alignments of two sequences, as pairs of indices."""
    if not a and not b:
        yield []
    if a and b:
        yield from ([*rest, (len(a) - 1, len(b) - 1)] for rest in every_alignment(a[:-1], b[:-1]))
    if a:
        yield from ([*rest, (len(a) - 1, None)] for rest in every_alignment(a[:-1], b))
    if b:
        yield from ([*rest, (None, len(b) - 1)] for rest in every_alignment(a, b[:-1]))


def edits_and_equals(a, b, pairs):
    equal = sum(i is not None and j is not None and a[i] == b[j] for i, j in pairs)
    return len(pairs) - equal, -equal


def test_alignments_are_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a = [str(w) for w in rng.integers(0, 3, rng.integers(0, 5))]
        b = [str(w) for w in rng.integers(0, 3, rng.integers(0, 5))]
        best = min(edits_and_equals(a, b, pairs) for pairs in every_alignment(a, b))
        found = alignment(a, b)
        assert edits_and_equals(a, b, found) == best
        assert [i for i, _ in found if i is not None] == [*range(len(a))]
        assert [j for _, j in found if j is not None] == [*range(len(b))]


def test_words_that_are_left_out_do_not_shift_the_others():
    reference = [Fact(str(k), w) for k, w in enumerate(["cat", "dog", "box", "key"])]
    found = compare("read", reference, read("read", "cat box map pen"))
    assert found.kept == (True, False, True, False)
    assert found.changed == (False, False, False, True)
    assert found.invented == 1


def without(scene, k):
    return Scene(
        scene.width, scene.height, scene.frames, (*scene.things[:k], *scene.things[k + 1 :]),
        scene.background, scene.texts, scene.look,
    )  # fmt: skip


def place_of(changed):
    """The place of the middle of changed pixels, bool (height, width)."""
    y, x = (np.nonzero(changed.any(axis))[0] for axis in (1, 0))
    row = int((y[0] + y[-1] + 1) / 2 / changed.shape[0] * 4)
    column = int((x[0] + x[-1] + 1) / 2 / changed.shape[1] * 3)
    return PLACES[3 * row + column]


def color_of(pixels, changed):
    """The named colour whose hue is nearest to the mean of the changed pixels."""
    import colorsys

    red, green, blue = pixels[changed].mean(0) / 255
    hue = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
    return min(HUES, key=lambda name: min(abs(HUES[name] - hue), 360 - abs(HUES[name] - hue)))


def test_descriptions_agree_with_pixels():
    """Every object's place, size and colour, from the pixels that change when it is taken away."""
    for one in (item("validation", "describe", k) for k in range(12)):
        (scene,) = one.scenes
        whole = render(scene)[0].astype(int)
        seen = {}
        for k in range(len(scene.things)):
            changed = (np.abs(whole - render(without(scene, k))[0]) > 24).any(-1)
            wide = np.nonzero(changed.any(0))[0]
            size = "small" if wide[-1] - wide[0] + 1 <= 24 else "large"
            seen[place_of(changed)] = size, color_of(whole, changed)
        assert [fact.key for fact in one.facts] == sorted(seen, key=PLACES.index)
        assert {f.key: tuple(f.value.split()[:2]) for f in one.facts} == seen
        assert read("describe", one.answer) == [*one.facts]


def test_counts_name_all_and_only_what_is_asked():
    for one in (item("validation", "count", k) for k in range(30)):
        word = one.question.split()[2].removesuffix(",")
        every = {f.key: f.value for f in described(one.scenes[0])}
        wanted = {key: v for key, v in every.items() if {word, word[:-1], word[:-2]} & {*v.split()}}
        *steps, total = one.facts
        assert {f.key: f.value for f in steps} == wanted
        assert total == Fact(SUM, str(len(wanted)))


def described(scene):
    """The objects of a scene, from its data."""
    return [
        Fact(
            PLACES[3 * int(y * 4 / scene.height) + int(x * 3 / scene.width)],
            f"{'small' if t.size <= 24 else 'large'} {t.color} {t.shape}",
        )
        for t in scene.things
        for x, y in [t.center()]
    ]


def test_pages_are_read_line_by_line():
    for one in (item("validation", "read", k) for k in range(12)):
        texts = one.scenes[0].texts
        lines = [[*g] for _, g in itertools.groupby(texts, key=lambda t: t.y)]
        tops = [min(t.y for t in line) for line in lines]
        bottoms = [max(t.box[3] for t in line) for line in lines]
        assert all(b < a for b, a in zip(bottoms, tops[1:], strict=False))
        for line in lines:
            assert all(a.box[2] < b.x for a, b in itertools.pairwise(line))
        assert all(t.x >= 0 and t.box[2] <= one.scenes[0].width for t in texts)
        assert [f.value for f in one.facts] == [t.text for t in texts]


def test_events_are_seen_in_their_second_alone_and_move_as_said():
    for one in (item("validation", "follow", k) for k in range(5)):
        (scene,) = one.scenes
        frames = render(scene, [k + 0.5 for k in range(scene.frames)]).astype(int)
        events = [k for k, thing in enumerate(scene.things) if thing.visible]
        assert len(events) == len(one.facts)
        for k, fact in zip(events, one.facts, strict=True):
            other = render(without(scene, k), [t + 0.5 for t in range(scene.frames)])
            changed = (np.abs(frames - other) > 24).any(-1)
            second, verb = int(fact.key), fact.value.split(maxsplit=5)[5]
            shown = changed.any((1, 2)).nonzero()[0]
            assert {*shown} <= {2 * second, 2 * second + 1}
            assert (len(shown) == 1) == (verb == "flashes")
            middles = [np.argwhere(changed[t]).mean(0) for t in shown]
            y, x = middles[-1] - middles[0]
            moved = {"moves left": x < -4, "moves right": x > 4, "moves up": y < -4}
            moved |= {"moves down": y > 4, "flashes": True, "stays": abs(x) + abs(y) < 1}
            assert moved[verb], (fact, x, y)
            place = PLACES[PLACES.index(" ".join(fact.value.split(":")[0].split()))]
            assert place_of(changed[shown].any(0)) == place


def test_differences_are_where_pixels_differ():
    for one in (item("validation", "compare", k) for k in range(12)):
        first, second = (render(scene)[0].astype(int) for scene in one.scenes)
        changed = (np.abs(first - second) > 8).any(-1)
        height, width = changed.shape
        keys = {fact.key for fact in one.facts}
        for number, place in enumerate(PLACES):
            row, column = divmod(number, 3)
            cell = changed[
                row * height // 4 + 8 : (row + 1) * height // 4 - 8,
                column * width // 3 + 8 : (column + 1) * width // 3 - 8,
            ]
            if place in keys:
                assert cell.any(), (place, one.facts)
        before, after = (
            {f.key: f.value.split(maxsplit=1)[1] for f in described(s)} for s in one.scenes
        )
        assert keys == {p for p in PLACES if before.get(p) != after.get(p)}


def test_splits_share_no_scene():
    scenes = {s: [item(s, f, k).scenes for f in FAMILIES for k in range(3)] for s in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not any(one in scenes[b] for one in scenes[a])


SPLITS = ("train", "validation", "test")
