"""Sentences about drawn scenes, true or false, in the words of NLVR's training sentences.

A form looks at a scene and returns a sentence with its truth, or nothing where the sentence would
be ambiguous. `statements` balances true and false for every form.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence

import numpy as np

from recipes.nlvr.scenes import COLORS, SHAPES, SIZES, Box, Item, Scene

Rng = np.random.Generator
Statement = tuple[str, bool]
Form = Callable[[Scene, Rng], Statement | None]
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
WALLS = {"base": ("base", "bottom"), "right": ("right wall",), "": ("edge", "wall", "side")}
HEIGHTS = (
    ("", operator.eq),
    ("exactly", operator.eq),
    ("at least", operator.ge),
    ("more than", operator.gt),
)
TRIES = 12
"""Sentences of a form that are drawn until one has the truth that is asked for."""


def pick(rng: Rng, options: Sequence) -> object:
    return options[int(rng.integers(len(options)))]


def statements(scene: Scene, count: int, rng: Rng) -> list[Statement]:
    """`count` different sentences about `scene`, about half of them true."""
    forms = TOWER_FORMS if scene.towers else ITEM_FORMS
    weights = np.array([weight for _, weight in forms])
    out: dict[str, bool] = {}
    for _ in range(4 * count):
        form = forms[int(rng.choice(len(forms), p=weights / weights.sum()))][0]
        wanted = bool(rng.random() < 0.5)
        for _ in range(TRIES):
            made = form(scene, rng)
            if made is not None and made[1] == wanted:
                out.setdefault(" ".join(made[0].split()), wanted)
                break
        if len(out) >= count:
            break
    return [*out.items()]


# Words


def number(rng: Rng, n: int) -> str:
    return str(n) if rng.random() < 0.4 else WORDS[n]


def quantity(rng: Rng, most: int = 4) -> tuple[str, int, Callable[[int], bool | None]]:
    """Words for a number of things, that number, and whether a count fits (None: ambiguous)."""
    n = int(rng.choice([1, 2, 3, 4, 5, 6, 7], p=[0.36, 0.26, 0.18, 0.11, 0.04, 0.03, 0.02]))
    n = min(n, most)
    kind = rng.random()
    if kind < 0.25:
        return f"at least {number(rng, n)}", n, lambda k: k >= n
    if kind < 0.55:
        word = "exactly" if rng.random() < 0.7 else "only"
        return f"{word} {number(rng, n)}", n, lambda k: k == n
    if n == 1:
        word = "a" if rng.random() < 0.7 else number(rng, 1)
        return word, 1, lambda k: k >= 1
    return number(rng, n), n, lambda k: None if k > n else k == n


def there(rng: Rng, n: int) -> str:
    return "there is" if n == 1 else "there are"


def plural(word: str, n: int) -> str:
    if n == 1:
        return word
    return word + ("es" if word.endswith("x") else "s")


Test = Callable[[Item], bool]


def noun(rng: Rng, scene: Scene, colored: float = 0.75) -> tuple[str, str, Test]:
    """Words before the noun, the noun, and which items are meant."""
    color = str(pick(rng, [*COLORS])) if rng.random() < colored else ""
    if scene.towers:
        return color, "block", lambda i: not color or i.color == color
    shape = str(pick(rng, SHAPES)) if rng.random() < 0.55 else ""
    size = str(pick(rng, [*SIZES])) if rng.random() < 0.06 else ""
    words = shape or ("item" if rng.random() < 0.7 else "object")

    def fits(i: Item) -> bool:
        return (
            (not color or i.color == color)
            and (not shape or i.shape == shape)
            and (not size or i.size == SIZES[size])
        )

    return f"{size} {color}".strip(), words, fits


def phrase(rng: Rng, scene: Scene, most: int = 4) -> tuple[str, int, Callable[[Box], bool | None]]:
    """Words like "exactly two black items", their number, and whether a box has as many."""
    words, n, fits = quantity(rng, most)
    before, name, test = noun(rng, scene)
    text = f"{words} {before} {plural(name, n)}".replace("  ", " ")
    return text, n, lambda box: fits(sum(map(test, box)))


def holder(rng: Rng, scene: Scene) -> tuple[str, int, Callable[[int], bool | None]]:
    """Words for the boxes or towers that a sentence counts."""
    words, n, fits = quantity(rng, 3)
    if rng.random() < 0.6:
        words, n, fits = "a", 1, lambda k: k >= 1
    name = "tower" if scene.towers and rng.random() < 0.85 else "box"
    return f"{words} {plural(name, n)}", n, fits


def boxes_with(scene: Scene, test: Callable[[Box], bool | None]) -> int | None:
    """How many boxes fit; None where that is ambiguous."""
    found = [test(box) for box in scene.boxes]
    return None if any(one is None for one in found) else sum(map(bool, found))


def has(rng: Rng, n: int) -> str:
    if n > 1:
        return str(pick(rng, ["with", "with", "that have"]))
    return str(pick(rng, ["with", "with", "with", "which has", "that has"]))


def result(text: str, fits: Callable[[int], bool | None], count: int | None) -> Statement | None:
    truth = None if count is None else fits(count)
    return None if truth is None else (text, truth)


# Forms for both kinds of scenes


def counted(scene: Scene, rng: Rng) -> Statement | None:
    """There are exactly two black items."""
    words, n, fits = quantity(rng, 6)
    before, name, test = noun(rng, scene)
    text = f"{there(rng, n)} {words} {before} {plural(name, n)}"
    return result(text, fits, sum(map(test, scene.items)))


def box_has(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with two black items and a yellow square."""
    words, n, fits = holder(rng, scene)
    parts = [phrase(rng, scene) for _ in range(int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])))]
    told = [text for text, _, _ in parts]
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"

    def test(box: Box) -> bool | None:
        all_of = [ok(box) for _, _, ok in parts]
        return False if False in all_of else (None if None in all_of else True)

    text = f"{there(rng, n)} {words} {has(rng, n)} {listed}"
    return result(text, fits, boxes_with(scene, test))


def total(scene: Scene, rng: Rng) -> Statement | None:
    """One of the grey boxes contains exactly four objects."""
    n = int(rng.integers(1, 5 if scene.towers else 8))
    name = "blocks" if scene.towers else str(pick(rng, ["objects", "items"]))
    name = name[:-1] if n == 1 else name
    how, ok = pick(rng, [("exactly", lambda k: k == n), ("at least", lambda k: k >= n)])
    start = str(
        pick(rng, ["one of the towers has", "there is a tower with", "there is one tower with"])
        if scene.towers
        else pick(
            rng,
            [
                "one of the grey square contains",
                "one of the grey box has",
                "there is a box with",
                "at least one grey box has",
            ],
        )
    )
    fitting = sum(ok(len(box)) for box in scene.boxes)
    if start.startswith("one of") and fitting > 1:
        return None
    return f"{start} {how} {number(rng, n)} {name}", fitting > 0


def colors_of(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with three items of only black and yellow color."""
    words, n, fits = holder(rng, scene)
    name = "blocks" if scene.towers else "items"
    k = int(rng.integers(2, 5))
    few = number(rng, k) if rng.random() < 0.5 else ""
    two = [str(c) for c in rng.permutation([*COLORS])[: int(rng.integers(1, 3))]]
    kind = int(rng.integers(4))
    if kind == 0:
        rest = f"only {' and '.join(two)} {name}"
        few, k = "", 0

        def test(box: Box) -> bool:
            return {i.color for i in box} == set(two)
    elif kind == 1:
        rest = f"{few} {name} of only {' and '.join(two)} color"

        def test(box: Box) -> bool:
            return {i.color for i in box} == set(two) and (not few or len(box) == k)
    elif kind == 2:
        many = int(rng.integers(2, 4))
        rest = f"{few} {name} of {number(rng, many)} different colors"

        def test(box: Box) -> bool:
            return len({i.color for i in box}) == many and (not few or len(box) == k)
    else:
        few = few or number(rng, k)
        rest = f"{few} {name} of the same {pick(rng, ['color', 'colour'])}"

        def test(box: Box) -> bool:
            return len(box) == k and len({i.color for i in box}) == 1

    text = f"{there(rng, n)} {words} {has(rng, n)} {rest}"
    return result(text, fits, boxes_with(scene, test))


def of_which(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with four items of which at least two are black."""
    words, n, fits = holder(rng, scene)
    k, few = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    color = str(pick(rng, [*COLORS]))
    how, ok = pick(
        rng,
        [("", lambda m: m == few), ("at least", lambda m: m >= few), ("only", lambda m: m == few)],
    )
    name = "blocks" if scene.towers else "items"
    verb = "is" if few == 1 else "are"

    def test(box: Box) -> bool:
        return len(box) == k and ok(sum(i.color == color for i in box))

    said = f"{number(rng, k)} {name} of which {how} {number(rng, few)} {verb} {color}"
    return result(f"{there(rng, n)} {words} {has(rng, n)} {said}", fits, boxes_with(scene, test))


def alone(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with only one item that is not black."""
    color = str(pick(rng, [*COLORS]))
    name, of = ("tower", "block") if scene.towers else ("box", "item")
    no = rng.random() < 0.3
    said = f"that is {'not ' if no else ''}{color}"
    if rng.random() < 0.3 and not no:
        said = f"and it is {color}"
    held = [box[0].color for box in scene.boxes if len(box) == 1]
    truth = any((one == color) != no for one in held)
    return f"there is a {name} with only one {of} {said}", truth


def same_number(scene: Scene, rng: Rng) -> Statement | None:
    """There are two boxes that has the same number of objects."""
    sizes = [len(box) for box in scene.boxes]
    if scene.towers:
        said = pick(rng, ["with the same number of blocks", "with the same height"])
        return f"there are two towers {said}", len({*sizes}) == 2
    return "there are two boxes that has the same number of objects", len({*sizes}) == 2


def top_item(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with three items and a black item on top."""
    tops = [min(box, key=lambda i: i.y) for box in scene.boxes if box]
    color, n = str(pick(rng, [*COLORS])), int(rng.integers(1, 5))
    name = "item" if rng.random() < 0.6 or not scene.towers else "block"
    if rng.random() < 0.5:
        box = pick(rng, ["box", "tower"]) if scene.towers else "box"
        how, least = ("at least ", True) if rng.random() < 0.3 else ("", False)
        said = f"{how}{number(rng, n)} {plural(name, n)}"
        found = [
            t.color == color
            for t, b in zip(tops, scene.boxes, strict=True)
            if (len(b) >= n if least else len(b) == n)
        ]
        return f"there is a {box} with {said} and a {color} {name} on top", any(found)
    return f"there is a box with a {color} {name} on top", any(t.color == color for t in tops)


def every(scene: Scene, rng: Rng) -> Statement | None:
    """Each grey box contains at least one yellow item."""
    before, name, test = noun(rng, scene, 1.0)
    start = pick(
        rng,
        ["each tower has", "all the towers have"]
        if scene.towers
        else ["each grey box contains", "all boxes have", "each box has"],
    )
    truth = all(any(map(test, box)) for box in scene.boxes)
    return f"{start} at least one {before} {name}", truth


# Scattered items


def touching(scene: Scene, rng: Rng) -> Statement | None:
    """There is at least one black circle touching the edge."""
    words, n, fits = quantity(rng, 5)
    before, name, test = noun(rng, scene)
    wall = str(pick(rng, ["", "", "base", "base", "right"]))
    place = str(pick(rng, WALLS[wall]))
    no = rng.random() < 0.3
    near = "" if no or rng.random() < 0.6 else "closely "
    of = " of a box" if near and place != "wall" else ""

    def at(i: Item) -> bool:
        return bool(i.walls if wall == "" else wall in i.walls)

    count = sum(test(i) and at(i) != no for i in scene.items)
    a = "any edge" if no and place == "edge" and rng.random() < 0.6 else f"the {place}"
    a = "right wall" if place == "right wall" and near else a
    said = f"{'not ' if no else ''}{near}touching {a}{of}"
    if rng.random() < 0.15 and not no:
        return f"there is no {before} {name} {said}", count == 0
    return result(f"{there(rng, n)} {words} {before} {plural(name, n)} {said}", fits, count)


def corner(scene: Scene, rng: Rng) -> Statement | None:
    """There is a black circle closely touching a corner of a box."""
    before, name, test = noun(rng, scene)
    found = sum(test(i) and len(i.walls) >= 2 for i in scene.items)
    of = " of a box" if rng.random() < 0.6 else ""
    said = f"{before} {name} closely touching a corner{of}"
    if rng.random() < 0.35:
        return f"there is no {said}", found == 0
    return f"there is {pick(rng, ['a', 'at least one', 'one'])} {said}", found > 0


def the_item(scene: Scene, rng: Rng) -> Statement | None:
    """The black square is not touching the edge. Of one item alone."""
    before, name, test = noun(rng, scene, 1.0)
    meant = [i for i in scene.items if test(i)]
    if len(meant) != 1:
        return None
    no = rng.random() < 0.5
    place = pick(rng, WALLS[""])
    return (
        f"the {before} {name} is {'not ' if no else ''}touching the {place}",
        bool(meant[0].walls) != no,
    )


def box_touches(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with two items and a black item touching the wall."""
    before, name, test = noun(rng, scene, 0.9)
    text, _, ok = phrase(rng, scene)

    def fits(box: Box) -> bool | None:
        return any(test(i) and i.walls for i in box) and ok(box)

    count = boxes_with(scene, fits)
    said = f"there is a box with {text} and a {before} {name} touching the {pick(rng, WALLS[''])}"
    return None if count is None else (said, count > 0)


def same_shape(scene: Scene, rng: Rng) -> Statement | None:
    """There is a box with two items of the same shape."""
    k = int(rng.integers(2, 5))
    color = str(pick(rng, ["", *COLORS]))

    def test(box: Box) -> bool:
        meant = [i for i in box if not color or i.color == color]
        return len(meant) == k and len({i.shape for i in meant}) == 1

    words, n, fits = holder(rng, scene)
    said = f"{number(rng, k)} {color} items of the same shape"
    return result(f"{there(rng, n)} {words} {has(rng, n)} {said}", fits, boxes_with(scene, test))


# Towers


def blocks(
    rng: Rng, height: int, chance: float, heights: Sequence
) -> tuple[str, Callable[[int], bool]]:
    """How many blocks a tower has, at a chance: the words, and whether a number of blocks fits."""
    if rng.random() >= chance:
        return "", lambda k: True
    how, compare = pick(rng, heights)
    words = f"{how} {number(rng, height)} {plural('block', height)}"
    return words, lambda k: compare(k, height)


def level(scene: Scene, rng: Rng) -> Statement | None:
    """There is a tower with four blocks and a black block at the base."""
    words, n, fits = holder(rng, scene)
    words = words.replace("boxes", "towers").replace("box", "tower")
    color, height = str(pick(rng, [*COLORS])), int(rng.integers(1, 5))
    place = str(pick(rng, ["base", "base", "top", "top", "middle", "second"]))

    def at(box: Box) -> bool:
        if place == "middle":
            return any(i.color == color for i in box[1:-1])
        index = {"base": 0, "top": -1, "second": 1}[place]
        return len(box) > (1 if place == "second" else 0) and box[index].color == color

    few, ok = blocks(rng, height, 0.35, HEIGHTS[:3])
    if place == "second":
        said = str(pick(rng, [f"{color} second block", f"a {color} block as the second level"]))
    elif rng.random() < 0.2 and place != "middle":
        said = f"{color} {place}"
        said = f"a {said}" if rng.random() < 0.6 else said
    else:
        the = "the " if rng.random() < 0.8 else ""
        where = "bottom" if place == "base" and rng.random() < 0.2 else place
        said = f"a {color} block {'in' if place == 'middle' else 'at'} {the}{where}"
    joined = f"{few} {pick(rng, ['and', 'having'])} {said}" if few else said
    count = sum(at(box) and ok(len(box)) for box in scene.boxes)
    return result(f"{there(rng, n)} {words} with {joined}", fits, count)


def as_part(scene: Scene, rng: Rng) -> Statement | None:
    """There are exactly two blue blocks as the base of a tower with three blocks."""
    words, n, fits = quantity(rng, 3)
    color, height = str(pick(rng, [*COLORS])), int(rng.integers(1, 5))
    place = str(pick(rng, ["base", "top"]))
    few, ok = blocks(rng, height, 0.6, HEIGHTS)
    index = 0 if place == "base" else -1
    count = sum(box[index].color == color and ok(len(box)) for box in scene.boxes)
    block = plural("block", n)
    text = (
        f"{there(rng, n)} {words} {color} {block} as the {place} of a tower {few and f'with {few}'}"
    )
    return result(text, fits, count)


def above(scene: Scene, rng: Rng) -> Statement | None:
    """There is exactly one yellow block on a black block."""
    upper, lower = str(pick(rng, [*COLORS])), str(pick(rng, [*COLORS]))
    found = [
        sum(b.color == upper and a.color == lower for a, b in itertools.pairwise(box))
        for box in scene.boxes
    ]
    over = pick(rng, ["above", "on", "over", "on top of"])
    said = f"{upper} block {over} a {lower} block"
    kind = rng.random()
    if kind < 0.15:
        return f"there is no {said}", sum(found) == 0
    if kind < 0.55:
        words, n, fits = quantity(rng, 2)
        words, n = (words, n) if n == 1 else ("a", 1)
        fits = fits if words != "a" else lambda k: k >= 1
        return result(f"there is {words} {said}", fits, sum(found))
    words, n, fits = quantity(rng, 3)
    towers = sum(f > 0 for f in found)
    return result(f"{there(rng, n)} {words} {plural('tower', n)} with a {said}", fits, towers)


def the_tower(scene: Scene, rng: Rng) -> Statement | None:
    """The tower with three blocks has a blue block at the top. Of one such tower alone."""
    height, color = int(rng.integers(1, 5)), str(pick(rng, [*COLORS]))
    meant = [box for box in scene.boxes if len(box) == height]
    if not meant:
        return None
    place = str(pick(rng, ["base", "top"]))
    fitting = [box[0 if place == "base" else -1].color == color for box in meant]
    few = f"{number(rng, height)} {plural('block', height)}"
    if len(meant) == 1 and rng.random() < 0.7:
        start = f"the tower with {few} has"
        if rng.random() < 0.3:
            return f"the {place} of a {number(rng, height)} blocks tower is {color}", fitting[0]
    else:
        start = f"one of the tower with {few} has"
    return f"{start} a {color} block at the {place}", any(fitting)


def plain_tower(scene: Scene, rng: Rng) -> Statement | None:
    """There is a yellow tower with only one block."""
    color, height = str(pick(rng, [*COLORS])), int(rng.integers(1, 4))
    alike = [len(box) for box in scene.boxes if {i.color for i in box} == {color}]
    if rng.random() < 0.5:
        return f"there is a {color} tower", bool(alike)
    few = f"only {number(rng, height)} {plural('block', height)}"
    return f"there is a {color} tower with {few}", height in alike


def all_towers(scene: Scene, rng: Rng) -> Statement | None:
    """All the towers have a black block at the base."""
    color, place = str(pick(rng, [*COLORS])), str(pick(rng, ["base", "top"]))
    at = [box[0 if place == "base" else -1].color == color for box in scene.boxes]
    if rng.random() < 0.3:
        return f"none of the towers have a {color} block at the {place}", not any(at)
    return f"all the towers have a {color} block at the {place}", all(at)


SHARED: list[tuple[Form, float]] = [
    (counted, 1.5),
    (box_has, 2.5),
    (total, 1.0),
    (colors_of, 1.2),
    (of_which, 0.5),
    (alone, 0.4),
    (same_number, 0.2),
    (top_item, 0.5),
    (every, 0.3),
]
ITEM_FORMS: list[tuple[Form, float]] = [
    *SHARED,
    (touching, 3.0),
    (corner, 0.8),
    (the_item, 0.5),
    (box_touches, 0.5),
    (same_shape, 0.3),
]
TOWER_FORMS: list[tuple[Form, float]] = [
    *SHARED,
    (level, 2.5),
    (as_part, 1.8),
    (above, 2.0),
    (the_tower, 0.8),
    (plain_tower, 0.5),
    (all_towers, 0.5),
]


PLACES = ("left", "middle", "right")


def primers(scene: Scene, rng: Rng, count: int) -> list[tuple[str, str]]:
    """Pairs of a few words and what they ask for: numbers of things, and colours of blocks."""
    out: dict[str, str] = {}
    for _ in range(count):
        k = int(rng.integers(3))
        box = scene.boxes[k]
        before, name, test = noun(rng, scene, 0.7)
        said = f"{before} {plural(name, 2)}".strip()
        if rng.random() < 0.3:
            out[f" number {said}"] = str(min(9, sum(map(test, scene.items))))
            continue
        if scene.towers and rng.random() < 0.6:
            at = int(rng.integers(len(box)))
            words = {0: "base", 1: "second", 2: "third", 3: "fourth"}
            place = "top" if at == len(box) - 1 and rng.random() < 0.4 else words[at]
            out[f" {PLACES[k]} {place}"] = box[at].color
            continue
        if not scene.towers and rng.random() < 0.3:
            wall = str(pick(rng, ["edge", "base", "right wall", "corner"]))
            fits = {
                "edge": lambda i: bool(i.walls),
                "base": lambda i: "base" in i.walls,
                "right wall": lambda i: "right" in i.walls,
                "corner": lambda i: len(i.walls) > 1,
            }[wall]
            held = sum(test(i) and fits(i) for i in box)
            out[f" {PLACES[k]} {said} touching {wall}"] = str(held)
            continue
        out[f" {PLACES[k]} {said}"] = str(sum(map(test, box)))
    return [*out.items()]
