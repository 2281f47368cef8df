"""Pages of the trained methods: paired tests by hand, and what a table says of its own run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.accuracy import answer_record

from benchmarks.accuracy.packed import PackedAnswers, Questions
from benchmarks.accuracy.studies import (
    adsc,
    ccam,
    long_video,
    selector,
    selector_features,
    trained,
    trained_page,
)
from benchmarks.accuracy.studies.trained import named
from tokencomp.errors import OptionError
from tokencomp.evaluation.runs import EvalRun
from tokencomp.inputs.questions import Example
from tokencomp.training.measure import Measurement

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
RIVALS = {"trained": ("training-free",)}
CARD = {
    "kind": "adsc",
    "model_id": "m",
    "data": "shapesqa:count",
    "seconds": 60.0,
    "config": {"steps": 7, "schedule": ["0.8", "0|0.5"], "options": {}, "seed": 3},
}


def arguments(folder: Path, sets: list[str], **more: Any) -> argparse.Namespace:
    defaults = {"model": "m", "split": "test", "report": False, "every": ["count", "video"]}
    return argparse.Namespace(output=folder, sets=sets, allow_dirty=True, **{**defaults, **more})


def filled(folder: Path, sets: list[str], right: dict[str, list[int]]) -> trained.StudyTables:
    """A study with one table per set."""
    card = folder / "card.json"
    card.write_text(json.dumps(CARD))
    study = trained.StudyTables("adsc", arguments(folder, sets), RIVALS)
    rows = [k.partition("@") for k in right if k != "full@0"]
    ways = [named(name, float(ratio), "uniform") for name, _, ratio in rows]
    for title in sets:
        measured = Measurement({}, None)
        for key, bits in right.items():
            records = [answer_record(str(i), "count", bool(bit)) for i, bit in enumerate(bits)]
            measured.runs[key] = EvalRun(None, records)
        study.add(title, measured.table(ways), measured.runs, {"trained": card})
    study.write()
    return study


RIGHT = {
    "full@0": [1] * 20,
    "trained@0.5": [1] * 18 + [0, 1],
    "training-free@0.5": [1] * 8 + [0] * 10 + [1, 1],
    "random@0.5": [0] * 20,
}


def test_paired_test_is_reported(tmp_path: Path, capsys) -> None:
    study = filled(tmp_path, ["count"], RIGHT)
    row = next(r for r in study.tables["count"]["rows"] if r["name"] == "trained")
    exact = 2 * sum(math.comb(11, k) for k in range(2)) / 2**11  # ten won, one lost
    assert row["against"] == {"training-free": {"wins": 10, "losses": 1, "p": pytest.approx(exact)}}
    page = (tmp_path / "adsc.md").read_text()
    assert "| count | trained | 0.5 | training-free | 10 | 1 | 0.012 | better |" in page
    assert "- trained against training-free: better: count at 0.5 (p = 0.012)." in page
    assert "tokencomp train adsc --model m --data shapesqa:count --seed 3 " in page
    assert "--schedule '0.8,0|0.5' --steps 7 --output FOLDER` (60 s)" in page
    assert page in capsys.readouterr().out


def test_where_downscale_fails_by_plain_counting() -> None:
    """Of ten questions downscaling gets four wrong, and the method answers three of those."""
    correct = {"ours@0.5": [1] * 9 + [0], "downscale@0.5": [1] * 6 + [0] * 4}
    agrees = {"ours@0.5": [1] * 8 + [0] * 2, "downscale@0.5": [1] * 6 + [0] * 4}
    answers = PackedAnswers(Questions((), (), (), ""), correct, agrees)
    rows = [
        {"name": name, "ratio": 0.5, "accuracy": 0.9, "achieved_ratio": 0.5}
        for name in ("ours", "downscale")
    ]
    ours, small = (trained_page.cells(r) for r in trained_page.compared(rows, answers, {}))
    assert ours[5].startswith("+30.0 [") and ours[6:] == ["75% of 4", "80%"]
    assert small[5:] == ["", "", "60%"]
    rows[1]["achieved_ratio"] = 0.2  # no baseline at this ratio
    ours, small = (trained_page.cells(r) for r in trained_page.compared(rows, answers, {}))
    assert ours[5:] == ["", "", "80%"] and set(small[2:]) == {"–"}


def test_tables_that_are_not_run_again_keep_what_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, ["count", "video"], RIGHT)
    other = {"date": "2000-01-01", "command": "", "versions": {"torch": "0"}, "commit": None}
    other["hardware"] = {"cpu": "abacus", "threads": 1}
    monkeypatch.setattr(trained, "environment", lambda: other)
    first = json.loads((tmp_path / "adsc.json").read_text())["tables"]["count"]
    filled(tmp_path, ["video"], {**RIGHT, "random@0.5": [1] * 20})
    tables = json.loads((tmp_path / "adsc.json").read_text())["tables"]
    assert tables["count"] == first
    assert tables["video"]["provenance"]["hardware"]["cpu"] == "abacus"
    packed = {title: PackedAnswers.from_json(t["answers"]) for title, t in tables.items()}
    right = {title: sum(one.correct["random@0.5"]) for title, one in packed.items()}
    assert right == {"count": 0, "video": 20}
    assert (tmp_path / "adsc.md").read_text().count("abacus") == 1


def test_sets_that_the_script_no_longer_has_are_dropped(tmp_path: Path) -> None:
    filled(tmp_path, ["image"], RIGHT)
    filled(tmp_path, ["count"], RIGHT)
    assert list(json.loads((tmp_path / "adsc.json").read_text())["tables"]) == ["count"]


@pytest.mark.parametrize("changed", [{"model": "other"}, {"split": "validation"}])
def test_models_and_splits_are_not_mixed(tmp_path: Path, changed: dict[str, str]) -> None:
    filled(tmp_path, ["count", "video"], RIGHT)
    with pytest.raises(OptionError, match="'count' has"):
        trained.StudyTables("adsc", arguments(tmp_path, ["video"], **changed), RIVALS)
    trained.StudyTables("adsc", arguments(tmp_path, ["count", "video"], **changed), RIVALS)


def test_no_page_names_a_place_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["x/adsc.py", "--weights", "/home/me/w", "--items", "20"])
    real = arguments
    monkeypatch.setitem(globals(), "arguments", lambda *a, **m: real(*a, weights="/home/me/w", **m))
    study = filled(tmp_path, ["count"], RIGHT)
    command = study.tables["count"]["provenance"]["command"]
    assert command == "python -m benchmarks.accuracy.studies.adsc --weights FOLDER --items 20"


def test_lost_cards_are_described() -> None:
    table = {"trained": {"ccam": "trained somehow"}}
    assert trained_page.training({"a": table, "b": table}) == ["- ccam: trained somehow."]


def test_published_ccam_page_says_that_the_mask_costs_accuracy() -> None:
    """Won and lost questions counted from the published bits."""
    tables = json.loads((FOLDER / "ccam.json").read_text())["tables"]
    page = (FOLDER / "ccam.md").read_text()
    assert list(tables) == ["image", "video, 8 frames", "video, 16 frames", "video, 48 frames"]
    for title, table in tables.items():
        correct = PackedAnswers.from_json(table["answers"]).correct
        key = next(k for k in correct if k.startswith("ccam@"))
        pairs = list(
            zip(correct[key], correct[key.replace("ccam@", "ccam without mask@")], strict=True)
        )
        won, lost = pairs.count((1, 0)), pairs.count((0, 1))
        ratio = f"{float(key.partition('@')[2]):.3g}"
        assert f"| {title} | ccam | {ratio} | ccam without mask | {won} | {lost} | " in page
    assert "ccam against ccam without mask: worse: video, 16 frames at 0.938" in page


@pytest.mark.parametrize(
    ("study", "name"),
    [
        (adsc, "adsc"),
        *(
            pytest.param(study, name, marks=pytest.mark.long)
            for study, name in (
                (ccam, "ccam"),
                (selector, "selector"),
                (selector_features, "selector_features"),
                (long_video, "long_video-tiny-qwen2-vl"),
                (long_video, "long_video-tiny-llava-onevision"),
            )
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_published_pages_are_those_of_the_published_results(
    tmp_path: Path, study: Any, name: str
) -> None:
    """The page comes back, and the results stay as they are."""
    for file in (f"{name}.json", f"{name}.md"):
        (tmp_path / file).write_text((FOLDER / file).read_text())
    args = arguments(tmp_path, [], report=True, every=list(study.SETS), weights=None, control=None)
    args.model = name.removeprefix("long_video-")
    study.main(argparse.Namespace(**vars(args), threads=1))
    assert (tmp_path / f"{name}.md").read_text() == (FOLDER / f"{name}.md").read_text()


class Halves:
    """Halves both sides of every picture; a token is a pixel."""

    def shrink(self, media: Any, ratio: float) -> Any:
        assert ratio == 0.75
        if isinstance(media, list):
            return [self.shrink(frame, ratio) for frame in media]
        return media.resize((media.width // 2, media.height // 2))

    def tokens(self, media: Any) -> int:
        return (
            sum(map(self.tokens, media)) if isinstance(media, list) else media.width * media.height
        )


def test_smaller_media_of_the_same_questions() -> None:
    image = Image.new("RGB", (8, 4))
    source = [Example("i", "?", "a", (image,)), Example("v", "?", "b", ([image] * 3,))]
    shrunk = trained.Shrunk(source, Halves(), 0.75, 8)
    first, second = shrunk
    assert (first.id, first.answer, first.media[0].size) == ("i", "a", (4, 2))
    assert [frame.size for frame in second.media[0]] == [(4, 2)] * 3
    assert shrunk.achieved == {0: 0.75, 1: 0.75}
