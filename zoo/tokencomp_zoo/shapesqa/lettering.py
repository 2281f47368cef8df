"""Words and numbers on pictures: real fonts, their measures, and where each character stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LIST = (
    "on go up no we it at by ox sun cat dog hat box key map cup pen bus van sky ice egg ant "
    "bee fox owl tea jam pie lake moon fish bird tree ship door bell rain snow wolf frog lamp "
    "book milk rope sand gold iron wind "
)
WORDS = tuple(_LIST.split())
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
SIZES = (20, 40)  # px
TRIES = 20


@dataclass(frozen=True)
class Text:
    """One word or number on a picture.

    ``x``, ``y`` are the top-left corner of its ink in pixels, ``size`` the font size in pixels;
    ``dark`` letters have a light outline, others the reverse, so they are legible on any texture.
    """

    text: str
    x: int
    y: int
    size: int
    font: str = FONTS[0]
    dark: bool = True

    @property
    def number(self) -> bool:
        return self.text.isdigit()

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box of the ink (left, top, right, bottom) in pixels."""
        width, height = extent(self.text, self.size, self.font)
        return self.x, self.y, self.x + width, self.y + height


@lru_cache(maxsize=256)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that matplotlib installs, which every installation of tokencomp has."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / f"fonts/ttf/{name}.ttf"), size)


@lru_cache(4096)
def extent(text: str, size: int, font: str) -> tuple[int, int]:
    """Width and height of the ink in pixels."""
    left, top, right, bottom = load_font(font, size).getbbox(text)
    return int(right - left), int(bottom - top)


def draw_text(pixels: np.ndarray, text: Text) -> np.ndarray:
    """A copy of uint8 (height, width, 3) with ``text`` on it."""
    image = Image.fromarray(pixels)
    font = load_font(text.font, text.size)
    left, top, *_ = font.getbbox(text.text)
    ink, edge = ((0, 0, 0), (255, 255, 255)) if text.dark else ((255, 255, 255), (0, 0, 0))
    place = (text.x - left, text.y - top)
    ImageDraw.Draw(image).text(
        place, text.text, fill=ink, font=font, stroke_width=1, stroke_fill=edge
    )
    return np.asarray(image)


def draw_word(rng: np.random.Generator, numbers: float) -> str:
    """A word, or in a share of `numbers` a number of two digits."""
    if rng.random() < numbers:
        return str(rng.integers(10, 100))
    return WORDS[int(rng.integers(len(WORDS)))]


def place_text(
    rng: np.random.Generator,
    width: int,
    height: int,
    taken: list[tuple[int, int, int, int]],
    numbers: float,
) -> Text | None:
    """A random word at a place that overlaps no box of ``taken``, or None when none is free."""
    word, size = draw_word(rng, numbers), int(rng.integers(SIZES[0], SIZES[1] + 1))
    font, dark = FONTS[int(rng.integers(len(FONTS)))], bool(rng.random() < 0.5)
    w, h = extent(word, size, font)
    for _ in range(TRIES if width > w + 8 and height > h + 8 else 0):
        x, y = int(rng.integers(2, width - w - 4)), int(rng.integers(2, height - h - 4))
        left, top, right, bottom = x - 3, y - 3, x + w + 3, y + h + 3
        if all(left > b[2] or right < b[0] or top > b[3] or bottom < b[1] for b in taken):
            return Text(word, x, y, size, font, dark)
    return None
