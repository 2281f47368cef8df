"""What every visual token shows: labels of a loss on an early layer of the decoder.

An answer looks objects up by their place or second, and words by the word before. This is learnt
several times faster if places, times, colours and words can be read off a visual token.
"""

from __future__ import annotations

import numpy as np

from recipes.tiny.families.qwen2_vl import CELL, PAIR
from recipes.tiny.labels import UNCLEAR, cell_labels, text_labels
from tokencomp.zoo.shapesqa.facts import PLACES, SIZES
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.long_scenes import FRAMES, SIDE, place_number
from tokencomp.zoo.shapesqa.scenes import COLORS, DIRECTIONS, SHAPES, SMALL, Scene

LINES = max(SIDE) // CELL
PARTS = {
    "row": LINES,
    "column": LINES,
    "place": len(PLACES),
    "color": 1 + len(COLORS),
    "shape": 1 + len(SHAPES),
    "word": 1 + len(WORDS),
    "second": max(FRAMES) // PAIR,
    "motion": 1 + len(DIRECTIONS),
    "size": 1 + len(SIZES),
}
"""Classes of each label; class 0 of "color", "shape", "word" and "size" is none of them."""


LATER = {"previous": 1 + len(WORDS), "change": 5}
"""The same for a later layer. The word before a word, 0 for the first. In the second of two
pictures: whether the place of a token is as before, or its object gone, new, recoloured, reshaped.
"""


def token_labels(scenes: tuple[Scene, ...], cell: int = CELL) -> np.ndarray:
    """Labels of all visual tokens of pictures or a clip, int64 (tokens, parts and later parts).

    A token covers a square of `cell` px of a scene.
    """
    first = scenes[0]
    if first.frames > 1:
        shown = [_labels(first, PAIR * s, s, cell) for s in range(first.frames // PAIR)]
    else:
        shown = [_labels(scene, 0.0, 0, cell) for scene in scenes]
    early = np.concatenate(shown)
    later = np.full((len(early), len(LATER)), UNCLEAR, np.int64)
    names = [*PARTS]
    if first.texts:
        words = [1 + WORDS.index(text.text) for text in first.texts]
        before = dict(zip(words, [0, *words], strict=False))
        marked = early[:, names.index("word")] > 0
        later[marked, 0] = [before[w] for w in early[marked, names.index("word")]]
    if len(scenes) == 2:
        places = shown[1][:, names.index("place")]
        later[-len(places) :, 1] = _changes(scenes)[places]
    return np.concatenate([early, later], 1)


def _changes(scenes: tuple[Scene, ...]) -> np.ndarray:
    """What has become of every place, int64 (places,): see `LATER`."""
    before, after = (
        {place_number(t.center(), s.width, s.height): t for t in s.things} for s in scenes
    )
    out = np.zeros(len(PLACES), np.int64)
    for place in {*before} | {*after}:
        old, new = before.get(place), after.get(place)
        if old is None or new is None:
            out[place] = 1 if new is None else 2
        elif old.color != new.color:
            out[place] = 3
        elif old.shape != new.shape:
            out[place] = 4
    return out


def _labels(scene: Scene, time: float, second: int, cell: int) -> np.ndarray:
    """Labels of the tokens of one picture or one pair of frames."""
    height, width = scene.height // cell, scene.width // cell
    row, column = np.indices((height, width))
    places = np.array(
        [
            [
                place_number(((c + 0.5) * cell, (r + 0.5) * cell), scene.width, scene.height)
                for c in range(width)
            ]
            for r in range(height)
        ]
    )
    color, shape, size = np.zeros_like(row), np.zeros_like(row), np.zeros_like(row)
    motion = np.full_like(row, UNCLEAR)
    for frame in range(PAIR if scene.frames > 1 else 1):
        seen = cell_labels(scene, time + frame + 0.5 * (scene.frames > 1), cell)
        shown = seen["words"][..., 0] > 0
        unclear = (seen["words"][..., 0] == UNCLEAR) & (color == 0)
        color[shown], shape[shown] = seen["words"][shown].T
        color[unclear], shape[unclear] = UNCLEAR, UNCLEAR
        motion[shown] = seen["motion"][shown]
        for r, c in zip(*shown.nonzero(), strict=True):
            dx, dy, wide = seen["box"][r, c, :3]
            size[r, c] = 1 + int(wide * cell > SMALL[1])
            center = (c + 0.5 + dx) * cell, (r + 0.5 + dy) * cell
            places[r, c] = place_number(center, scene.width, scene.height)
    word = text_labels(scene, cell)["word"] if scene.texts else np.zeros_like(row)
    when = np.full_like(row, second if scene.frames > 1 else UNCLEAR)
    if scene.frames == 1:
        motion[:] = UNCLEAR
    size[color == UNCLEAR] = UNCLEAR
    parts = (row, column, places, color, shape, word, when, motion, size)
    return np.stack(parts, -1).reshape(-1, len(PARTS)).astype(np.int64)
