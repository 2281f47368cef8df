"""What the demo says in words, against the numbers of rows written by hand; its moving pictures."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import tokencomp
from tokencomp import zoo
from tokencomp.cli._demo import packaged_questions, samples
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.prompts import build_inputs
from tokencomp.pages.pictures import animation_uri, strip, survival, tiles
from tokencomp.zoo.shapesqa.items import item


@pytest.mark.parametrize(
    ("random", "auto", "first", "second"),
    [
        ({}, {}, 0, 0),  # nothing to tell them apart
        ({1: 0}, {}, 1, 0),  # random misses the second question
        ({0: 0, 1: 0}, {0: 0}, 1, 0),  # the method misses the first one, too
        ({}, {0: 0}, 1, 0),  # random misses none
    ],
)
def test_questions_are_shown_that_random_gets_wrong(random, auto, first, second):
    """Marks of two questions about one file, by their place; where none is given, right."""
    by_file: dict = {}
    for example in packaged_questions():
        by_file.setdefault(example.media, []).append(example)
    one, other = [some for some in by_file.values() if len(some) > 1][:2]
    runs = {Setting(): {}, Setting("random", 0.75): random, Setting("auto", 0.75): auto}
    runs = {
        setting: EvalRun(
            setting,
            [
                {"id": e.id, "correct": marks.get(k, 1) if some is one else 1}
                for some in by_file.values()
                for k, e in enumerate(some)
            ],
        )
        for setting, marks in runs.items()
    }
    shown = samples(runs, list(runs))
    assert len(shown) == len(by_file)
    assert one[first] in shown and other[second] in shown


@pytest.mark.parametrize("count", [4, 8])
def test_animation_shows_the_pictures_of_the_sheet_in_order(count):
    """Every frame of the GIF is the tile of its time, up to the palette."""
    rng = np.random.default_rng(0)
    media = [Image.new("RGB", (56, 56), tuple(rng.integers(0, 255, 3))) for _ in range(count)]
    shares = [rng.integers(0, 2, (count, 2, 2)).astype(float)]
    shown = tiles(media, shares, 56)
    raw = base64.b64decode(animation_uri(shown).removeprefix("data:image/gif;base64,"))
    with Image.open(io.BytesIO(raw)) as gif:
        assert gif.n_frames == len(shown) == count and gif.info["loop"] == 0
        for k, tile in enumerate(shown):
            gif.seek(k)
            error = np.asarray(gif.convert("RGB")).astype(int) - np.asarray(tile)
            assert np.abs(error).mean() < 4
    sheet = strip(tiles(media, shares, 56))
    assert np.array_equal(np.asarray(sheet)[:56, :56], np.asarray(shown[0]))


def test_pictures_leave_out_the_times_between_frames():
    """Qwen3-VL: the span of a video holds text, which is no patch and always stays."""
    model, processor = zoo.load("tiny-qwen3-vl")
    inputs = build_inputs(processor, [[item("test", "needle", 0).video()]], ["?"])
    with tokencomp.patch(model, 0.75, reducer="uniform") as handle, torch.no_grad():
        model(**inputs)
    (share,) = survival(handle.stats)
    assert share.shape == (4, 8, 8) == handle.stats.spans[0][0].grid
    assert {*share.ravel()} == {0.0, 1.0} and share.sum() == handle.stats.tokens_after[0][0]
    assert (survival(handle.stats, 0)[0] == share).all()


def test_frames_that_share_a_position_have_the_same_patches():
    """Eight frames in four positions: frame k is dark unless position k // 2 is kept."""
    media = [Image.new("RGB", (56, 56), (200, 200, 200)) for _ in range(8)]
    share = np.zeros((4, 1, 1))
    share[2] = 1
    light = [np.asarray(tile).mean() for tile in tiles(media, [share], 56)]
    assert [k for k, mean in enumerate(light) if mean > 150] == [4, 5]
