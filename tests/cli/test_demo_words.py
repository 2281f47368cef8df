"""What the demo says in words, against the numbers of rows written by hand; its moving pictures."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokencomp
from tokencomp import zoo
from tokencomp.cli._demo import packaged_questions, samples
from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import Split
from tokencomp.inputs.prompts import build_inputs
from tokencomp.pages.demo import Demo, Row, saved
from tokencomp.pages.measured import prefill_speed
from tokencomp.pages.pictures import animation_uri, strip, survival, tiles
from tokencomp.zoo.shapesqa.items import item


def _row(name, ratio, per_layer, flops, accuracy):
    setting = Setting(name, ratio) if ratio else Setting()
    split = Split(*[0.0] * len(Split.__dataclass_fields__))
    deviation = setting.deviation(len(per_layer))
    return Row(setting, per_layer, ratio, flops, flops, split, 1.0, accuracy, deviation=deviation)


def test_sentences_say_what_was_kept_and_what_it_cost():
    rows = [
        _row("full", 0.0, [200, 200, 200, 200], 1000.0, 0.9),
        _row("random", 0.75, [50, 50, 50, 50], 400.0, 0.5),
        _row("fastv", 0.5, [200, 200, 0, 0], 600.0, 0.8),
        _row("fastv", 0.75, [50, 50, 50, 50], 400.0, 0.7),
    ]
    demo = Demo("m", {}, rows, [], items=40, failed=0)
    assert "a video as 200 visual tokens" in demo.opening and "what fastv keeps" in demo.opening
    half, quarter = demo.sentences
    assert "100 of 200 visual tokens" in half and "60% of the decoder's work" in half
    assert "80% of 40 answers" in half and "compression 90%" in half and "random" not in half
    assert "50 of 200 visual tokens" in quarter and "at random 50%" in quarter
    notes = demo.moves  # four layers: nothing would be left after layer 2
    assert "fastv at 0.5 cuts before layer 1" in notes[0] and "schedule: 2" in notes[0]
    assert "fastv at 0.75 cuts before layer 0" in notes[1] and len(notes) == 2


def test_merged_tokens_are_called_merged():
    """The cache keeps its size; of an image of which all tokens are dropped it does not."""
    full = Cost(64, [64, 64], 1000, 100)
    merging, dropping = Cost(64, [16, 16], 400, 100), Cost(64, [16, 16], 400, 40)
    merged, dropped = (saved(Setting("auto", 0.75), cost, full) for cost in (merging, dropping))
    assert "sees 16 of 64 visual tokens on average, the rest merged into them." in merged
    assert "100% of its cache, in which merged tokens are repeated." in merged
    assert "merged" not in dropped and "40% of its cache." in dropped


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


def test_a_copy_without_measured_times_says_where_they_are(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from tokencomp.cli.demo import _print
    from tokencomp.pages import demo as page
    from tokencomp.pages import measured

    monkeypatch.setattr(measured.prefill_speed, "__defaults__", (tmp_path / "none",))
    rows = [_row("full", 0.0, [8, 8], 10.0, 1.0), _row("uniform", 0.5, [4, 4], 6.0, 1.0)]
    facts = {**environment(), "family": "F", "parameters": 9, "layers": 2, "dtype": "float32"}
    demo = Demo("m", facts, rows, [], items=1, failed=0)
    _print(Console(), demo)
    assert "benchmarks/models/prefill.md in the repository" in capsys.readouterr().out
    content = page.write(demo, tmp_path / "page.html").read_text()
    assert "comes without the measured times" in content
    assert not re.search(r'(src|href)="(?!data:|#)', content), "the page loads nothing"


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


def test_times_of_real_shapes_are_those_of_the_result_file(tmp_path):
    file = Path(__file__).parents[2] / "benchmarks" / "models" / "prefill.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (known,) = [
        r["speedup"]
        for r in lines
        if (r["model"], r["visual_tokens"], r["reducer"], r["ratio"])
        == ("qwen2-vl-2b", 4096, "merge", 0.75)
    ]
    speed = prefill_speed(file)
    (row,) = [one[-1] for one in speed.rows if one[:4] == ("qwen2-vl-2b", "video", 4096, "merge")]
    assert row[speed.ratios.index(0.75)] == known > 1
    assert lines[-1]["environment"]["hardware"]["cpu"] in speed.where
    packaged = prefill_speed()  # a part of what was measured
    assert packaged.rows and all(one in speed.rows for one in packaged.rows)
    assert prefill_speed(tmp_path / "none.jsonl") is None
