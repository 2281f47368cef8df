"""The pages of the tower stage say what their records say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.families import FAMILIES

from benchmarks.accuracy.packed import PackedAnswers, Questions
from benchmarks.accuracy.studies import tower as study
from benchmarks.accuracy.studies import tower_book, tower_page, tower_sizes, tower_variants
from benchmarks.models import tower, tower_alone
from benchmarks.models.tower_page import page as page_of_times
from tokencomp import VisualTokens, make_reducer
from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.metrics import difference
from tokencomp.evaluation.runs import EvalRun
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs, prompt_lengths
from tokencomp.plan.reducer import reduced
from tokencomp.tokens.spans import SpanBatch


def test_verdicts_of_the_study() -> None:
    """96 of 100 against a ceiling of 100: below the first bar, above the second."""

    def rights(count: int) -> list[int]:
        return [1] * count + [0] * (100 - count)

    answers = {"full@0": rights(100), "entry only@0": rights(100)}
    answers |= {"kcenter@0.5": rights(96), "kcenter@0.6": rights(95), "kcenter@0.75": rights(93)}
    answers |= {"downscale@0.5": rights(80), "downscale@0.75": rights(93)}
    said = "\n".join(tower_page.verdicts(answers))
    assert "at 0.5 keeps 96.0% of entry only: it misses 97%" in said
    assert "at 0.75 keeps 93.0% of entry only: it meets 92%" in said
    assert "k-center at 0.5 is above downscale at 0.5: +16.0 points" in said
    assert "k-center at 0.75 is not different from downscale at 0.75: +0.0 points" in said
    assert said in tower_page.page({"qwen-images": entry(answers, ["count"])})


def entry(answers: dict[str, list[int]], families: list[str]) -> dict[str, Any]:
    """A stored set whose questions are split evenly among `families`."""
    each = len(answers["full@0"]) // len(families)
    records = [
        {"id": f"test-{family}-{i:05d}", "family": family, "answer": "1"}
        for family in families
        for i in range(each)
    ]
    packed = PackedAnswers(Questions.of(records), answers)
    return {
        "model": study.QWEN, "weights": "w", "split": "test", "vivid": [], "answers": packed,
        "blind": dict.fromkeys(families, 0.5),
        "provenance": {**environment(), "commit": "abc+dirty"},
    }  # fmt: skip


def test_families_of_the_study() -> None:
    """One family is answered by all rows; of others, k-center loses what fewer pixels keep.

    tiny-qwen2-vl has not learned to count actions.
    """
    good, half = [1] * 150, [1] * 50 + [0] * 100
    answers = {"full@0": good, "entry only@0": good, "kcenter@0.5": half, "kcenter@0.6": half}
    answers |= {"kcenter@0.75": half, "downscale@0.75": good, "fewer_frames@0.75": half}
    stored = entry(answers, ["count", "needle", "action_count"])
    text = tower_page.page({"qwen-hard-videos": {**stored, "vivid": [0, 1] * 75}})
    # Of 50 questions, 7.1 % may be otherwise where none is.
    assert "| kcenter | 0.5 | 100.0%, +0.0 [-7.1, +7.1] | 0.0%, -100.0 [-100.0, -92.9] |" in text
    assert "commit abc (**uncommitted code**)" in text
    assert "| what the tower sees | tower ratio | count | needle | action_count | panning |" in text
    assert "not among these: action_count (100%, a blind guess 50%): 0.75 against downs" in text
    assert "below them: needle: 0.75 against downscale at 0.75, -100.0 points" in text


def test_stored_sets_are_packed(tmp_path: Path) -> None:
    """What is read is what was written, and later rows stand in the order of the table."""
    answers = {"full@0": [1, 1, 0, 1], "entry only@0": [1, 0, 0, 1], "random@0.5": [0, 0, 0, 1]}
    stored = {**entry(answers, ["count", "needle"]), "vivid": [0, 1, 1, 0]}
    more = PackedAnswers(stored["answers"].questions, {"runlength@0.75": [1, 0, 1, 0]})
    grown = tower_book.with_rows(stored, more, {"commit": "c"})
    tower_book.write(tmp_path / "tower.json", {"set": grown})
    (back,) = tower_book.read(tmp_path / "tower.json").values()
    assert back == grown and back["commits"] == ["c"] and "commits" not in stored
    expected = ["full@0", "entry only@0", "runlength@0.75", "random@0.5"]
    assert list(back["answers"].correct) == expected
    assert back["answers"].correct["runlength@0.75"] == [1, 0, 1, 0]
    other = entry({"full@0": [1, 1]}, ["count", "needle"])["answers"]
    with pytest.raises(OptionError, match="questions differ"):
        tower_book.with_rows(stored, other, {"commit": "c"})


def test_a_set_is_answered_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that exist stay unless they are named; rows of other weights are answered again."""
    one = study.QuestionSet(study.QWEN, ("attribute",), 1, ("uniform",), ())
    monkeypatch.setattr(study, "SETS", {"qwen-images": one})
    monkeypatch.setattr(study, "ACCURACY", tmp_path / "folder")
    monkeypatch.setattr(study, "page", lambda sets: " ".join(sets))
    monkeypatch.setattr(sys, "argv", ["tower", "--output", str(tmp_path)])
    settings_run: list[list[str]] = []
    sweep = study.sweep

    def noted(model: Any, processor: Any, items: Any, settings: Any, *a: Any, **kw: Any) -> Any:
        settings_run.append([s.name for s in settings])
        return sweep(model, processor, items, settings, *a, **kw)

    monkeypatch.setattr(study, "sweep", noted)
    study.main()
    path = tmp_path / "tower.json"
    first = path.read_text()
    book = tower_book.read(path)
    correct = book["qwen-images"]["answers"].correct
    assert len(correct) == 6 and len(settings_run.pop()) == 6
    study.main()
    assert not settings_run and path.read_text() == first
    assert correct.pop("uniform@0.6")
    tower_book.write(path, book)
    study.main()
    assert settings_run.pop() == ["uniform 0.6"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows", "uniform", "--again"])
    study.main()
    assert settings_run.pop() == ["uniform 0.5", "uniform 0.6", "uniform 0.75"]
    monkeypatch.setattr(sys, "argv", sys.argv[:3])
    stale = tower_book.read(path)
    assert stale["qwen-images"]["answers"] == tower_book.read(path)["qwen-images"]["answers"]
    stale["qwen-images"]["weights"] = "other"
    tower_book.write(path, stale)
    study.main()
    assert len(settings_run.pop()) == 6


@pytest.mark.parametrize("name", [study.ONEVISION, study.VILA])
def test_smaller_towers(name: str) -> None:
    """At its own size a model answers as ever; at a smaller one it gets fewer tokens."""
    picture, tokens = Image.new("RGB", (224, 224), "red"), {}
    plain, processor = load_model(name, device="cpu")
    side = plain.config.vision_config.image_size
    inputs = build_inputs(processor, [[picture]], ["What is it?"])
    with torch.no_grad():
        expected = plain(**inputs).logits
    for size in (side, study.SIDES[name][-1]):
        model, processor = tower_sizes.at_side(name, size)
        inputs = build_inputs(processor, [[picture]], ["What is it?"])
        with torch.no_grad():
            logits = model(**inputs).logits
        tokens[size] = prompt_lengths(model, inputs)[0][1]
        if size == side:
            assert torch.allclose(logits, expected, atol=1e-5)
    assert tokens[size] < 0.35 * tokens[side]


def test_intervals_are_paired() -> None:
    """Answers that are equal but for one differ by little, whichever questions are drawn."""
    near = difference([1, 0, 1, 1] * 25, [0, 0, 1, 1] + [1, 0, 1, 1] * 24)
    assert near.value == pytest.approx(0.01) and (near.low, near.high < 0.04) == (0.0, True)
    half = difference([1] * 50 + [0] * 50, [0] * 100)
    assert half.value == pytest.approx(0.5) and 0.35 < half.low < 0.45 < 0.55 < half.high < 0.65


def test_the_page_of_times() -> None:
    parts = dict.fromkeys(("preprocess", "tower", "choose", "rest", "reduce", "prefill"), 1.0)
    record = {
        "case": "qwen-image", "tokens": 1024, "machine": "here", "rounds": 2,
        "pairs": {"full": [1.0, 1.0], "both": [3.9, 4.1]},
        "parts": {"full": {**parts, "total": 12.0}, "both": {**parts, "total": 3.0}},
        "speedup": {"full": 1.0, "both": 4.0},
        "provenance": {**environment(), "commit": "2750d9876537d92e9b4bcbb877190ea096b57b11"},
    }  # fmt: skip
    text = page_of_times([record])
    assert "| 12.00 s | 1.00× [1.00, 1.00] | 2 | here |" in text
    assert "| 3.00 s | 4.00× [3.90, 4.10] | 2 | here |" in text
    assert "commit 2750d9876537 (**commit not in the repository**)" in text


def test_towers_alone_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends after two rows measures the other three when it is started again."""
    measured: list[float] = []
    run = tower_alone.TowerCase.run

    def counted(self: tower_alone.TowerCase, ratio: float) -> tuple[float, float, float]:
        if len(measured) == 3:  # one to warm up, and two rows
            measured.append(-1.0)
            raise KeyboardInterrupt
        measured.append(ratio)
        return run(self, ratio)

    monkeypatch.setattr(tower_alone, "build", lambda *_, **__: FAMILIES["qwen2_vl"].build())
    monkeypatch.setattr(tower_alone, "qwen_inputs", lambda *_: {"inputs": _square()})
    monkeypatch.setattr(tower_alone.TowerCase, "run", counted)
    command = ["tower", "--towers", "--cases", "qwen-tower", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        tower.main()
    tower.main()
    last = tower_alone.TOWER_RATIOS[-1]
    assert measured == [last, 0.0, 0.25, -1.0, last, 0.5, 0.6, 0.75]
    tower.main()
    assert len(measured) == 8
    rows = [json.loads(line) for line in (tmp_path / "tower.jsonl").read_text().splitlines()]
    assert [r["tower_ratio"] for r in rows] == list(tower_alone.TOWER_RATIOS)
    # One block of width 32 on n patches and the merger, which reads four patches at a time.
    linear = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64)
    flops = [n * linear + 4 * 32 * n * n + n // 4 * 2 * (128 * 128 + 128 * 64) for n in (256, 128)]
    assert rows[2]["flop_limit"] == pytest.approx(flops[0] / flops[1])
    assert (tmp_path / "tower.md").read_text().count("| tower of Qwen2-VL-2B and 7B") == 4


def test_variants_without_their_change_are_k_centre(tmp_path: Path) -> None:
    """Places of weight 0 and a share too small for one cell change nothing; without a file, no
    table is written."""
    x = torch.rand(48, 27, generator=torch.Generator().manual_seed(0))
    span = VisualTokens(x, (1, 6, 8), torch.zeros(48, dtype=torch.bool), pixels=(1, 3, 3))
    batch = SpanBatch.of(span)
    expected = reduced(make_reducer("kcenter", pool=1), batch, [9]).keep.tolist()
    plain = tower_variants.Places(pool=1, weight=0.0), tower_variants.Outstanding(1, share=0.1)
    assert [reduced(reducer, batch, [9]).keep.tolist() for reducer in plain] == [expected] * 2
    changed = tower_variants.Places(pool=1, weight=5.0), tower_variants.Outstanding(1, share=0.5)
    for reducer in changed:
        kept = reduced(reducer, batch, [9]).keep.tolist()
        assert len(kept) == 9 and kept == sorted(set(kept)) != expected
    assert tower_variants.section(tmp_path / tower_variants.NAME) == []


def test_distances_are_compared_by_set(tmp_path: Path) -> None:
    """One column per set, one row per weights and tower ratio; reading is named on its own."""
    path = tmp_path / tower_book.DISTANCE
    assert tower_page.distances(path) == []
    names = ["qwen3-images", "qwen-images"]
    families = ("count", "count", "reading", "reading")
    questions = Questions(tuple("abcd"), families, tuple("1234"), "digest")
    right = {"entry only@0": [1, 1, 1, 1], "0, 0@0.75": [1, 1, 0, 0], "2, 1@0.75": [1, 1, 1, 0]}
    answers = PackedAnswers(questions, right).to_json()
    path.write_text(json.dumps({"sets": {name: {"answers": answers} for name in names}}))
    text = "\n".join(tower_page.distances(path))
    assert "| contrast, change | tower ratio | qwen3-images (4) | qwen-images (4) |" in text
    assert "| 0, 0 | 0.75 | 50.0% | 50.0% |" in text and "| 2, 1 | 0.75 | 75.0% | 75.0% |" in text
    reading = "- reading (2): entry only 100.0%; 0, 0 at 0.75: 0.0%; 2, 1 at 0.75: 50.0%."
    assert reading in text and "action_count" not in text


def _square() -> dict[str, torch.Tensor]:
    """A picture of 16 x 16 patches for the tiny Qwen2-VL."""
    return {"pixel_values": torch.randn(256, 96), "image_grid_thw": torch.tensor([[1, 16, 16]])}


def test_rows_of_another_machine_are_not_compared() -> None:
    def row(ratio: float, seconds: float, cpu: str) -> dict[str, object]:
        return {
            "case": "qwen-tower", "tower_ratio": ratio, "seconds": [seconds], "choose_s": [0.1],
            "flop_limit": 2.0, "machine": "one thread", "provenance": {"hardware": cpu},
        }  # fmt: skip

    rows = [row(0.0, 8.0, "a"), row(0.5, 4.0, "a"), row(0.6, 4.0, "b")]
    (pair,) = tower_alone.compared(rows)
    assert (pair["tower_ratio"], pair["speedup"], pair["full_s"]) == (0.5, 2.0, 8.0)


def test_an_unanswered_question_stops_the_study() -> None:
    """A damaged file is no wrong answer."""
    rows = [{"id": "a", "family": "count", "error": "cannot be read"}]
    with pytest.raises(OptionError, match="a was not answered"):
        study._packed({"full@0": EvalRun(None, rows)})
