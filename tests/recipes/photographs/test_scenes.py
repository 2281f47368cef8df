"""Questions about composed photographs: answers, words, splits, and where pictures come from."""

from __future__ import annotations

from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.photographs import COLORS, Drawings

from recipes.photographs.items import items
from recipes.photographs.questions import COUNTS, FAMILIES
from recipes.photographs.scenes import SIZE, cell_letters, render, sample_words
from recipes.photographs.sources import Photos, missing
from tokencomp.errors import OptionError


def boxes(pixels: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Center x, center y and area of every thing, from the pixels of its colour alone."""
    found = {}
    for name, color in COLORS.items():
        y, x = np.nonzero((pixels == color).all(-1))
        if len(x):
            box = x.min(), x.max() + 1, y.min(), y.max() + 1
            area = (box[1] - box[0]) * (box[3] - box[2])
            found[name] = ((box[0] + box[1]) / 2, (box[2] + box[3]) / 2, float(area))
    return found


def answer_from_pixels(family: str, text: str, pixels: np.ndarray) -> str:
    """The answer that the picture itself gives."""
    seen, words = boxes(pixels), text.rstrip("?").split()
    if family == "name":
        (answer,) = seen
    elif family == "existence":
        answer = "yes" if words[-1] in seen else "no"
    elif family == "count":
        answer = COUNTS[len(seen) - 1]
    elif family == "half":
        axis = 0 if words[-1] == "right" else 1
        answer = words[-1] if seen[words[2]][axis] > SIZE / 2 else words[-3]
    elif family == "place":
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[words[-1]]
        answer = min(seen, key=lambda n: sign * seen[n][axis])
    elif family == "size":
        pick = max if words[3] == "biggest" else min
        answer = pick(seen, key=lambda n: seen[n][2])
    else:
        own = seen.pop(words[-1])
        answer = min(seen, key=lambda n: (seen[n][0] - own[0]) ** 2 + (seen[n][1] - own[1]) ** 2)
    return answer


ASKED = [f for f in FAMILIES if f != "reading"]


@pytest.mark.parametrize(
    "group", [pytest.param(n, marks=[pytest.mark.long] * (i > 1)) for i, n in enumerate(ASKED)]
)
def test_answers_follow_from_the_pixels(group: str) -> None:
    answers = set()
    for one in items(Drawings(), "test", 25, (group,)):
        pixels = render(one.scene, Drawings())
        assert one.answer == answer_from_pixels(group, one.query.text, pixels)
        assert one.answer in one.options and len(set(one.options)) == len(one.options)
        answers.add(one.answer)
    assert len(answers) > 1


def test_words_are_drawn_where_no_thing_is() -> None:
    """Only the pixels of the word's box change, and it covers no thing."""
    from dataclasses import replace

    for one in items(Drawings(), "test", 10, ("reading",)):
        (text,) = one.scene.texts
        assert one.answer == text.text
        bare = render(replace(one.scene, texts=()), Drawings())
        assert boxes(render(one.scene, Drawings())) == boxes(bare)
        y, x = np.nonzero((render(one.scene, Drawings()) != bare).any(-1))
        left, top, right, bottom = text.box
        assert left - 2 <= x.min() and x.max() <= right + 2
        assert top - 2 <= y.min() and y.max() <= bottom + 2


def test_letters_of_cells_spell_the_words() -> None:
    """Along the middle of a word its letters come in order; cells without ink have none."""
    for index in range(5):
        scene = sample_words(np.random.default_rng(index), Drawings(), "train")
        grid, inside = cell_letters(scene, 4), 0
        for text in scene.texts:
            left, top, right, bottom = text.box
            row = grid[(top + bottom) // 8][left // 4 : right // 4 + 1]
            assert [k for k, _ in groupby(row) if k] == [k for k, _ in groupby(text.text)]
            inside += ((bottom - top) // 4 + 2) * ((right - left) // 4 + 4)
        assert len(scene.texts) > 4 and 0 < sum(map(bool, chain(*grid))) <= inside


def test_splits_share_no_scene() -> None:
    scenes = [
        {repr(one.scene.things) for one in items(Drawings(), split, 20, ("place",))}
        for split in ("train", "validation", "test")
    ]
    assert not scenes[0] & scenes[1] | scenes[1] & scenes[2] | scenes[0] & scenes[2]


def test_photographs_are_stamps_with_a_name_as_caption(tmp_path: Path) -> None:
    """No drawings, no longer captions, nothing tiny; every background is in one split."""
    stamps, templates = tmp_path / "stamps" / "animals", tmp_path / "templates"
    scenery = tmp_path / "scenery"
    for folder in (stamps, stamps / "cartoon", templates, scenery):
        folder.mkdir(parents=True)
    for name, side, text in (
        ("a", 60, "A fox."), ("b", 60, "A red fox."), ("c", 20, "A fox."), ("d", 60, "A fox."),
        ("e", 60, "An owl\nfr.utf8=Un hibou"), ("cartoon/f", 60, "A fox."),
    ):  # fmt: skip
        Image.new("RGBA", (side, side), (9, 9, 9, 255)).save(stamps / f"{name}.png")
        (stamps / f"{name}.txt").write_text(text)
    (stamps / "d.svg").touch()
    for number in range(5):
        Image.new("RGB", (30, 30)).save(templates / f"{number}.jpg")
        Image.new("RGB", (30, 30)).save(scenery / f"n{number}.jpg")
    Image.new("RGB", (30, 30)).save(tmp_path / "more.jpg")
    more = (f"{tmp_path.name}/*.jpg",)
    photos = Photos(tmp_path, scenery, more, ("fox", "owl"))
    assert photos.files == {"fox": (stamps / "a.png",), "owl": (stamps / "e.png",)}
    split = {k: [p.stem for p in photos.background_files(k)] for k in photos.landscapes}
    assert split == {
        "train": ["0", "1", "2", "n0", "n1", "n2", "more"],
        "validation": ["3", "n3"],
        "test": ["4", "n4"],
    }
    with pytest.raises(OptionError, match=r"photograph of koala .*apt-get install"):
        _ = Photos(tmp_path, scenery, more, ("koala",)).files
    with pytest.raises(OptionError, match=r"none/\* names no file.*apt-get install"):
        _ = Photos(tmp_path, scenery, ("none/*",)).further


def test_of_several_photographs_the_last_is_for_tests_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `FURTHER` count too, and a thing with one photograph has it in every split."""
    monkeypatch.setattr("recipes.photographs.sources.FURTHER", {"fox": ("red", "absent")})
    (tmp_path / "stamps").mkdir()
    for name, text in (("fox", "A fox."), ("red", "A red fox."), ("owl", "An owl.")):
        Image.new("RGBA", (60, 60), (9, 9, 9, 255)).save(tmp_path / "stamps" / f"{name}.png")
        (tmp_path / "stamps" / f"{name}.txt").write_text(text)
    photos = Photos(tmp_path, tmp_path, names=("fox", "owl"))
    shown = {
        split: [[photos.files[n][k].stem for k in photos.numbers(n, split)] for n in photos.names]
        for split in ("train", "validation", "test")
    }
    assert shown["train"] == shown["validation"] == [["fox"], ["owl"]]
    assert shown["test"] == [["red"], ["owl"]]


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else name)
    assert missing() == ['pip install -e ".[real]"   # gguf']
