"""Backgrounds: as they are where a model is judged, and changed where it learns."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from recipes.photographs.grounds import Ground, Look, draw_ground, sample_ground


class Squares:
    """Two backgrounds whose pixels tell where they come from."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
        self.pictures = [Image.fromarray(one) for one in values]

    def backgrounds(self, split: str) -> int:
        return 2

    def background(self, split: str, number: int) -> Image.Image:
        return self.pictures[number]


PLAIN = Ground(0, (1.0, 0.5, 0.0))


def drawn(ground: Ground, size: int = 64) -> np.ndarray:
    return np.asarray(draw_ground(ground, Squares(), "train", size)).astype(int)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_pictures_that_judge_show_photographs_as_they_are(split: str) -> None:
    for seed in range(50):
        ground = sample_ground(np.random.default_rng(seed), Squares(), split)
        assert ground.look is None and ground.second is None


def test_training_changes_most_backgrounds() -> None:
    """In 200 draws every kind of change comes up, and so does a background as it is."""
    grounds = [sample_ground(np.random.default_rng(k), Squares(), "train") for k in range(200)]
    looks = [ground.look for ground in grounds if ground.look]
    assert {look.turns for look in looks} == {0, 1, 2, 3}
    assert {look.is_mirrored for look in looks} == {False, True}
    assert len({look.channels for look in looks}) == 6
    assert 30 < sum(look.hue > 0 for look in looks) < 90
    assert 25 < sum(ground.look is None for ground in grounds) < 80
    assert 30 < sum(ground.second is not None for ground in grounds) < 100
    assert {ground.number for ground in grounds} == {0, 1}


def test_a_crop_is_the_part_that_it_names() -> None:
    """The photograph is 96 × 64 px; its middle 64 columns are shown at their own size."""
    photo = np.asarray(Squares().pictures[0]).astype(int)
    np.testing.assert_array_equal(drawn(PLAIN), photo[:, 16:80])


def test_turns_mirrors_and_channels_move_pixels_alone() -> None:
    plain = drawn(PLAIN)
    turned = drawn(replace(PLAIN, look=Look(turns=1)))
    mirrored = drawn(replace(PLAIN, look=Look(is_mirrored=True)))
    swapped = drawn(replace(PLAIN, look=Look(channels=(2, 0, 1))))
    for row, column in ((0, 0), (3, 50), (63, 7)):
        assert (turned[63 - column, row] == plain[row, column]).all()
        assert (mirrored[row, 63 - column] == plain[row, column]).all()
        assert (swapped[row, column] == plain[row, column][[2, 0, 1]]).all()


def test_brightness_and_hue_follow_their_formulas() -> None:
    plain = drawn(PLAIN)
    bright = drawn(replace(PLAIN, look=Look(gamma=0.7)))
    np.testing.assert_allclose(bright, 255 * (plain / 255) ** 0.7, atol=0.51)
    turned = drawn(replace(PLAIN, look=Look(hue=64)))
    for row in range(0, 64, 7):
        hue, saturation, value = colorsys.rgb_to_hsv(*plain[row, 5] / 255)
        wanted = np.multiply(255, colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value))
        assert np.abs(turned[row, 5] - wanted).max() <= 9  # hues are whole numbers here


def test_a_second_background_shows_through_in_patches() -> None:
    """Every pixel lies between both pictures, and either is seen undisturbed somewhere."""
    other = replace(PLAIN, number=1)
    one, two = drawn(PLAIN), drawn(other)
    both = drawn(replace(PLAIN, second=other, mask=(3, 7)))
    assert (both >= np.minimum(one, two) - 1).all() and (both <= np.maximum(one, two) + 1).all()
    for picture in (one, two):
        assert (np.abs(both - picture) <= 4).all(-1).mean() > 0.1
