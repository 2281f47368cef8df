"""What the cell of every visual token shows: the labels of the vision stage."""

from __future__ import annotations

import numpy as np

from tokencomp.zoo.shapesqa.lettering import WORDS, Text, load_font
from tokencomp.zoo.shapesqa.render import shape_mask
from tokencomp.zoo.shapesqa.scenes import COLORS, DIRECTIONS, SHAPES, Scene

MIN_COVER = 0.077  # share of a cell that an object must cover for its label to count
PLACES = 8  # columns and rows that a picture is divided into, whatever its size
GLYPHS = "abcdefghijklmnopqrstuvwxyz0123456789"
UNCLEAR = -100  # too small a part to decide; the loss ignores these


def cells(pixels: np.ndarray, cell: int) -> np.ndarray:
    """(height, width) cut into cells: (rows, columns, cell, cell)."""
    rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell
    cut = pixels[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
    return cut.transpose(0, 2, 1, 3)


def owner_map(scene: Scene, time: float = 0.0) -> np.ndarray:
    """Index of the thing that covers each pixel, int8 (H, W), -1 for background."""
    owner = np.full((scene.height, scene.width), -1, np.int8)
    for index, thing in enumerate(scene.things):
        if thing.visible_at(time):
            left, top, right, bottom = thing.box(time)
            owner[top:bottom, left:right][shape_mask(thing.shape, thing.size) > 0.5] = index
    return owner


def cell_labels(scene: Scene, time: float, cell: int) -> dict[str, np.ndarray]:
    """What each token's cell shows. A cell belongs to the object that covers most of it.

    Returns
    -------
    dict
        `words` int64 (rows, columns, 2): colour and shape, 0 = background, -100 = too little to
        tell; `mask` float32 (rows, columns, 49): object or not on a 7×7 lattice; `box` float32
        (rows, columns, 5): centre of the object relative to the cell's and its size, in cells, then
        the share of the object that lies in this cell relative to its best cell, then 1 where the
        object's centre lies in this cell; `place` int64 (rows, columns, 2): column and row of the
        object's centre in a grid of 8×8 over the picture, -100 = no object; `motion` int64 (rows,
        columns): 0 = at rest, 1… = direction, -100 = no object.
    """
    owner = cells(owner_map(scene, time), cell)
    rows, columns = owner.shape[:2]
    step = cell // 7
    edge = (cell - 7 * step) // 2
    inner = owner[..., edge : edge + 7 * step, edge : edge + 7 * step]
    lattice = inner.reshape(rows, columns, 7, step, 7, step) >= 0
    out: dict[str, np.ndarray] = {
        "mask": lattice.mean((3, 5)).reshape(rows, columns, 49).astype(np.float32),
        "words": np.zeros((rows, columns, 2), np.int64),
        "box": np.zeros((rows, columns, 5), np.float32),
        "place": np.full((rows, columns, 2), UNCLEAR, np.int64),
        "motion": np.full((rows, columns), UNCLEAR, np.int64),
    }
    if not scene.things:
        return out
    area = np.stack([(owner == i).sum((2, 3)) for i in range(len(scene.things))], -1)
    best, most = area.argmax(-1), area.max(-1)
    out["words"][most > 0] = UNCLEAR
    for row, column in zip(*np.nonzero(most > MIN_COVER * cell**2 - 1), strict=True):
        index = best[row, column]
        thing = scene.things[index]
        x, y = thing.center(time)
        dx, dy = x / cell - column - 0.5, y / cell - row - 0.5
        inside = float(max(abs(dx), abs(dy)) <= 0.5)
        share = most[row, column] / area[..., index].max()
        out["words"][row, column] = COLORS.index(thing.color) + 1, SHAPES.index(thing.shape) + 1
        out["box"][row, column] = dx, dy, thing.size / cell, share, inside
        out["place"][row, column] = place(x, scene.width), place(y, scene.height)
        direction = thing.direction
        out["motion"][row, column] = 1 + [*DIRECTIONS].index(direction) if direction else 0
    return out


def place(offset: float, side: int) -> int:
    """Which eighth of ``side`` a coordinate lies in."""
    return min(PLACES - 1, int(offset / side * PLACES))


def text_labels(scene: Scene, cell: int) -> dict[str, np.ndarray]:
    """Which character and which word each token's cell shows.

    Returns
    -------
    dict
        `glyph` int64 (rows, columns): 0 = none, 1… = the character most of which lies in the cell,
        -100 = a smaller part of one; `word` the same for words of the list, set where the middle of
        the word lies, -100 on the rest of it and on numbers; `digits` (rows, columns, 2): the two
        digits of a number, where its middle lies, -100 elsewhere.
    """
    rows, columns = scene.height // cell, scene.width // cell
    glyph = np.zeros((rows, columns), np.int64)
    word = np.zeros((rows, columns), np.int64)
    digits = np.full((rows, columns, 2), UNCLEAR, np.int64)
    cover = np.zeros((rows, columns))
    for text in scene.texts:
        _mark_glyphs(text, cell, glyph, cover)
        left, top, right, bottom = text.box
        word[top // cell : bottom // cell + 1, left // cell : right // cell + 1] = UNCLEAR
        middle = int((top + bottom) / 2) // cell, int((left + right) / 2) // cell
        if middle[0] >= rows or middle[1] >= columns:
            continue
        if text.number:
            digits[middle] = [int(digit) for digit in text.text]
        else:
            word[middle] = 1 + WORDS.index(text.text)
    return {"glyph": glyph, "word": word, "digits": digits}


def glyph_boxes(text: Text) -> list[tuple[str, float, float]]:
    """Every character of a text with its left and right edge in pixels."""
    font = load_font(text.font, text.size)
    edges = [text.x + font.getlength(text.text[:k]) for k in range(len(text.text) + 1)]
    return list(zip(text.text, edges[:-1], edges[1:], strict=True))


def _mark_glyphs(text: Text, cell: int, glyph: np.ndarray, cover: np.ndarray) -> None:
    """Write the characters of one word into ``glyph``; ``cover`` holds their overlap in px²."""
    rows, columns = glyph.shape
    _, top, _, bottom = text.box
    for character, left, right in glyph_boxes(text):
        for row in range(top // cell, min(rows, bottom // cell + 1)):
            for column in range(int(left) // cell, min(columns, int(right) // cell + 1)):
                width = min(right, (column + 1) * cell) - max(left, column * cell)
                height = min(bottom, (row + 1) * cell) - max(top, row * cell)
                overlap = max(0.0, width) * max(0.0, height)
                if overlap > 0.4 * (right - left) * (bottom - top) and overlap > cover[row, column]:
                    cover[row, column] = overlap
                    glyph[row, column] = 1 + GLYPHS.index(character)
                elif overlap > 0 and glyph[row, column] == 0:
                    glyph[row, column] = UNCLEAR
