"""Runs against answers generated one by one, and questions that fail."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from PIL import Image
from support.console import run as command
from support.embedded import HOW, one_by_one

import tokencomp
from tokencomp.errors import OptionError, SpanError, UnknownNameError, WeightsError
from tokencomp.evaluation import Example, Setting, evaluate, grid, sweep
from tokencomp.evaluation.store import read_records
from tokencomp.inputs.prompts import build_inputs
from tokencomp.plan.reducer import Traits
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens


def test_batches_answer_like_single_prompts(loaded, examples):
    settings = grid(["uniform", "prune"], [0.5])
    runs = sweep(*loaded, examples, settings, batch_size=3, **HOW)
    for setting in settings:
        reducer = None if setting == Setting() else setting.reducer
        predictions = [r["prediction"] for r in runs[setting].records]
        assert predictions == [one_by_one(loaded, e, reducer, setting.ratio) for e in examples]
        assert [r["id"] for r in runs[setting].records] == [e.id for e in examples]


def test_costs_are_those_of_the_shapes(loaded, examples):
    """64 tokens an image, 256 a video; FLOPs and bytes recomputed by hand.

    In decoding, one token attends to what every layer kept of the prompt and to itself; of merged
    tokens the cache holds a row for every token that one stands for.
    """
    model, processor = loaded
    text = model.config.get_text_config()
    d, layers = text.hidden_size, text.num_hidden_layers
    linear = 2 * (4 * d * d + 3 * d * text.intermediate_size)
    merging = Setting("kcenter", 0.75, merge=True)
    runs = sweep(*loaded, examples, [Setting("uniform", 0.75), merging], **HOW)
    for setting, run in runs.items():
        for record, example in zip(run.records, examples, strict=True):
            visual = 256 if example.media[0].suffix == ".mp4" else 64
            inputs = build_inputs(processor, [example.load(8)], [example.prompt])
            full = inputs["input_ids"].shape[1]
            n = full - visual + visual // 4
            rows = full if setting == merging else n
            assert record["visual_tokens"] == visual and record["ratio"] == 0.75
            assert record["per_layer"] == [visual // 4] * layers
            assert record["decode_flops"] == layers * (linear + 4 * d * (rows + 1))
            if setting != merging:
                pairs = sum(range(1, n + 1))
                assert record["flops"] == layers * (n * linear + 4 * d * pairs)
                assert record["kv_bytes"] == layers * n * 2 * d * 4


@dataclass(frozen=True)
class Refuses(Uniform):
    """A reducer that takes no prompt of a model."""

    calls: ClassVar[int] = 0

    traits = Traits(batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        type(self).calls += len(tokens) == 1
        raise SpanError("of no grid")


def test_after_ten_failures_without_an_answer_nothing_is_tried(loaded, examples, monkeypatch):
    """Files that are not there, and a reducer that refuses every prompt; the others go on."""
    tried = []
    load = Example.load
    monkeypatch.setattr(Example, "load", lambda e, frames: tried.append(e.id) or load(e, frames))
    gone = [Example(str(i), "?", "x", ("gone.png",)) for i in range(25)]
    runs = sweep(*loaded, gone, grid(["uniform"], [0.5]), batch_size=4, **HOW)
    assert len(tried) == 10
    for run in runs.values():
        reasons = [r["error"] for r in run.failed]
        assert len(reasons) == 25 and all("no such file" in r for r in reasons)
        assert [r.startswith("not asked") for r in reasons] == [False] * 10 + [True] * 15
    items = [replace(examples[0], id=str(i)) for i in range(15)]
    settings = [Setting(Refuses(), 0.5, name="refuses"), Setting("uniform", 0.5)]
    refused, fine = sweep(*loaded, items, settings, batch_size=5, **HOW).values()
    assert Refuses.calls == 10 and len(refused.failed) == 15 and len(fine.answered) == 15


def test_a_command_fails_if_a_setting_answers_nothing(examples, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Uniform, "reduce", Refuses.reduce)
    monkeypatch.setattr(Uniform, "calls", 0, raising=False)
    line = {"question": "?", "answer": "x", "media": str(examples[0].media[0])}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    args = ("--model", folder, "--data", tmp_path / "q.jsonl", "-r", "uniform", "--no-baselines")
    assert command("eval", *args, "-o", tmp_path / "runs") != 0


def test_media_that_cannot_be_read_are_recorded_and_the_rest_goes_on(loaded, examples, tmp_path):
    """Qwen2-VL takes no picture that is more than 200 times as wide as high, for one."""
    Image.new("RGB", (2500, 8)).save(tmp_path / "wide.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all" * 50)
    reasons = {"wide.png": "200", "broken.mp4": "", "gone.png": "no such file"}
    bad = [Example(name, "?", "x", (str(tmp_path / name),)) for name in reasons]
    items = [examples[0], *bad, *examples[1:]]
    settings = grid(["uniform", "downscale"], [0.5])
    for setting, run in sweep(*loaded, items, settings, tmp_path / "r", **HOW).items():
        assert [r["id"] for r in run.failed] == [*reasons]
        assert all(reasons[r["id"]] in r["error"] for r in run.failed)
        assert run.manifest["summary"]["failed"] == 3
        reducer = "uniform" if setting.name == "uniform" else None
        said = {r["id"]: r["prediction"] for r in run.answered}
        if setting.name != "downscale":
            alone = {e.id: one_by_one(loaded, e, reducer, setting.ratio) for e in examples}
            assert said == alone
        assert said.keys() == {e.id for e in examples}


@dataclass(frozen=True)
class Demanding(Uniform):
    """Uniform, which refuses spans of fewer tokens than `least`."""

    least: int = 64

    def keep_count(self, span, fraction):
        if span.visual < self.least:
            raise SpanError(f"{span.visual} tokens are too few")
        return super().keep_count(span, fraction)


def test_an_item_that_a_method_refuses_fails_under_it_alone(loaded, examples, tmp_path):
    """Other methods answer it, and this method the other items, as single prompts."""
    Image.new("RGB", (112, 112), "red").save(tmp_path / "tiny.png")
    tiny = Example("tiny", "?", "x", (str(tmp_path / "tiny.png"),))
    items = [examples[0], tiny, *examples[1:]]
    demanding = Setting(Demanding(), 0.5, name="demanding")
    full, run = sweep(*loaded, items, [Setting(), demanding], tmp_path / "r", **HOW).values()
    assert [(r["id"], r["error"]) for r in run.failed] == [("tiny", "16 tokens are too few")]
    expected = [one_by_one(loaded, e, "uniform", 0.5) for e in examples]
    assert [r["prediction"] for r in run.answered] == expected
    assert [r["prediction"] for r in full.records] == [one_by_one(loaded, e) for e in items]


def test_an_error_of_the_setting_ends_the_run(loaded, examples):
    with pytest.raises(WeightsError, match="trained weights"):
        evaluate(*loaded, examples[:1], "ccam", 0.5, **HOW)


def test_a_batch_that_is_refused_is_asked_one_by_one(loaded, examples, monkeypatch):
    """A processor that cannot stack rows; what the model itself raises ends the run."""
    from tokencomp.evaluation import batches

    def alone(processor, media, prompts):
        if len(media) > 1:
            raise RuntimeError("stack expects each tensor to be equal size")
        return build_inputs(processor, media, prompts)

    monkeypatch.setattr("tokencomp.evaluation.batches.build_inputs", alone)
    run = evaluate(*loaded, examples, "uniform", 0.5, **HOW)
    expected = [one_by_one(loaded, e, "uniform", 0.5) for e in examples]
    assert [r["prediction"] for r in run.records] == expected

    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(batches, "generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        evaluate(*loaded, examples, "uniform", 0.5, **HOW)


def test_an_item_too_large_for_memory_fails_alone(loaded, examples, monkeypatch):
    """Videos never fit: they are recorded with the reason, images are answered."""
    from tokencomp.evaluation import batches

    real = batches.generate

    def small(model, processor, inputs, n):
        if "pixel_values_videos" in inputs or inputs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("pretend")
        return real(model, processor, inputs, n)

    expected = evaluate(*loaded, examples, "uniform", 0.5, batch_size=2, **HOW)
    monkeypatch.setattr(batches, "generate", small)
    run = evaluate(*loaded, examples, "uniform", 0.5, batch_size=8, **HOW)
    answers = [{r["id"]: r["prediction"] for r in one.answered} for one in (expected, run)]
    assert answers[1].items() <= answers[0].items()
    video = {e.id for e in examples if e.media[0].suffix == ".mp4"}
    assert {r["id"] for r in run.failed} == video and len(run.answered) == len(examples) - 2
    assert all("memory" in r["error"] for r in run.failed)
    assert run.manifest["batch_halved_by_oom"] is True


@pytest.mark.parametrize("baseline", ["downscale", "fewer_frames"])
def test_equal_token_baselines_come_near_the_budget(loaded, examples, baseline):
    run = evaluate(*loaded, examples, baseline, 0.75, **HOW)
    for record in run.records:
        wanted = record["visual_tokens"] // 4
        assert record["visual_tokens"] in (64, 256)
        assert abs(record["per_layer"][0] - wanted) <= max(2, wanted // 8)


def test_a_patch_of_the_model_waits_outside(loaded, examples):
    """What "full" says is said by the whole model, and the patch is there again afterwards."""
    settings = grid(["uniform"], [0.9])
    expected = sweep(*loaded, examples, settings, batch_size=1, **HOW)
    with tokencomp.patch(loaded[0], 0.95, reducer="random") as handle:
        runs = sweep(*loaded, examples, settings, batch_size=1, **HOW)
        handle.set(ratio=0.9)  # in force again
    predictions = [[(r["prediction"], r["ratio"]) for r in run.records] for run in runs.values()]
    plain = [[(r["prediction"], r["ratio"]) for r in run.records] for run in expected.values()]
    assert predictions == plain


def test_two_processes_share_the_items(loaded, examples, tmp_path, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        evaluate(*loaded, examples, "uniform", 0.5, tmp_path, **HOW)
    files = sorted(p.name for p in tmp_path.glob("records*.jsonl"))
    assert files == ["records.1.jsonl", "records.jsonl"]
    assert sorted(r["id"] for r in read_records(tmp_path)) == sorted(e.id for e in examples)


def test_ratios_by_modality_have_one_order():
    ratios = {"image": 0.5, "video": 0.9}
    one, other = (Setting("uniform", r) for r in (ratios, dict(reversed(ratios.items()))))
    assert one == other and one.label == other.label


def test_settings_refuse_what_makes_no_sense():
    with pytest.raises(UnknownNameError, match="bipartite"):
        Setting("bipartitee", 0.5)
    with pytest.raises(OptionError, match="no option"):
        Setting("uniform", 0.5, {"seed": 1})
    with pytest.raises(OptionError, match="no options"):
        Setting("downscale", 0.5, {"seed": 1})
    assert Setting("aim", 0.0) == Setting()
    assert [s.label for s in grid(["aim"], [0, 0.5])] == ["full", "aim-0.5"]


@pytest.mark.parametrize(
    "answer, said, right",
    [
        ("red", "Red.", True),
        ("red", "dark red", False),
        ("A", "(A) red", True),
        ("A", "A", True),
        ("A", "An apple", False),
        ("A", "A red circle", False),
        ("B", "red (B)", True),
        ("D", "Doors are (B)", False),
        ("B", "A", False),
    ],
)
def test_what_counts_as_right(answer, said, right):
    assert Example("", "", answer).correct(said) is right
