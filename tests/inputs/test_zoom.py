"""A marked pixel is found in what a model saw of a region, and led back to where it was marked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tokencomp.errors import OptionError
from tokencomp.inputs.zoom import Region

SIZE = 90, 70


def marked(x: int, y: int) -> Image.Image:
    pixels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    pixels[y, x] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("seen", [(41, 23), (82, 46), (84, 56), (123, 200)])
def test_every_pixel_of_an_enlarged_region(seen: tuple[int, int]) -> None:
    region = Region.around(30, 60, (41, 23), SIZE)
    rng = np.random.default_rng(0)
    for _ in range(60):
        x = region.left + int(rng.integers(region.width))
        y = region.top + int(rng.integers(region.height))
        for filtering in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC):
            shown = np.asarray(region.cut(marked(x, y)).resize(seen, filtering))
            row, column = np.unravel_index(shown.argmax(), shown.shape)
            assert region.locate(int(column), int(row), seen) == (x, y)


@pytest.mark.parametrize("seen", [(30, 20), (45, 35), (28, 56)])
def test_a_reduced_picture_is_off_by_less_than_a_pixel_of_it(seen: tuple[int, int]) -> None:
    region = Region(0, 0, *SIZE)
    for x, y in [(0, 0), (89, 69), (44, 35), (13, 51)]:
        shown = np.asarray(marked(x, y).resize(seen, Image.Resampling.BOX))
        row, column = np.unravel_index(shown.argmax(), shown.shape)
        at = region.locate(int(column), int(row), seen)
        assert abs(at[0] - x) < SIZE[0] / seen[0]
        assert abs(at[1] - y) < SIZE[1] / seen[1]


def test_thousandths() -> None:
    region = Region(200, 100, 500, 250)
    for x in range(500):  # every pixel has two thousandths, every row four
        assert region.locate(2 * x, 2 * x, (1000, 1000)) == (200 + x, 100 + x // 2)
        assert region.locate(2 * x + 1, 2 * x + 1, (1000, 1000)) == (200 + x, 100 + x // 2)


def test_the_end_of_the_scale_is_the_last_pixel() -> None:
    assert Region(200, 100, 500, 250).locate(1000, 1000, (1000, 1000)) == (699, 349)


def test_a_region_stays_inside_and_holds_its_pixel() -> None:
    for size in [(1, 1), (40, 30), (90, 70), (500, 20)]:
        for x in range(0, SIZE[0], 7):
            for y in range(0, SIZE[1], 7):
                region = Region.around(x, y, size, SIZE)
                assert (region.width, region.height) == (min(size[0], 90), min(size[1], 70))
                assert np.asarray(region.cut(marked(x, y))).max() == 255
                assert region.left >= 0 and region.left + region.width <= SIZE[0]
                assert region.top >= 0 and region.top + region.height <= SIZE[1]


def test_places_outside_are_refused() -> None:
    with pytest.raises(OptionError, match="outside a picture of 90 × 70"):
        Region.around(90, 0, (10, 10), SIZE)
    with pytest.raises(OptionError, match="in the unit of the answer"):
        Region(0, 0, *SIZE).locate(100, 5, SIZE)
    with pytest.raises(OptionError, match=r"pixel \(90, 70\) of a picture of 45 × 35"):
        Region.around(80, 60, (30, 30), SIZE).cut(marked(0, 0).resize((45, 35)))
