"""Runs against answers generated one by one, and stored answers that are taken up again."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from support.embedded import HOW, one_by_one

import tokencomp
from tokencomp.errors import OptionError, SpanError, WeightsError
from tokencomp.evaluation import Example, Setting, batches, evaluate, grid, patches, sweep
from tokencomp.evaluation.store import AnswerStore, read_records
from tokencomp.inputs.prompts import build_inputs
from tokencomp.reducers.random import Random
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.tokens import Tokens
from tokencomp.training.measure import Measurement


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

    In decoding, one token attends to what every layer kept of the prompt and to itself.
    """
    model, processor = loaded
    text = model.config.get_text_config()
    d, layers = text.hidden_size, text.num_hidden_layers
    linear = 2 * (4 * d * d + 3 * d * text.intermediate_size)
    merging = Setting("kcenter", 0.75, merge=True)
    settings = [Setting("uniform", 0.75), merging, Setting("downscale", 0.75)]
    runs = sweep(*loaded, examples, settings, **HOW)
    for setting, run in runs.items():
        for record, example in zip(run.records, examples, strict=True):
            visual = 256 if example.media[0].suffix == ".mp4" else 64
            inputs = build_inputs(processor, [example.load(8)], [example.prompt])
            full = inputs["input_ids"].shape[1]
            n = full - visual + visual // 4
            assert record["visual_tokens"] == visual and record["ratio"] == 0.75
            assert record["per_layer"] == [visual // 4] * layers
            assert record["decode_flops"] == layers * (linear + 4 * d * (n + 1))
            assert record["kv_bytes"] == layers * n * 2 * d * 4
            if setting != merging:
                pairs = sum(range(1, n + 1))
                assert record["flops"] == layers * (n * linear + 4 * d * pairs)


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


RANDOM = Setting("random", 0.75)


def kept(reducer: Any, place: tuple[int, int], keep: int = 6) -> tuple[int, ...]:
    tokens = Tokens(torch.zeros(64, 4), [(1, 8, 8)], [keep], span_ids=[place])
    return tuple(reducer.reduce(tokens).patches.tolist())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Kept places by name of the question."""
    places: dict[str, tuple[int, ...]] = {}

    class Spying(patches.PatchedModels):
        @contextlib.contextmanager
        def applied(self, setting: Setting, names: Any) -> Any:
            with super().applied(setting, names) as handle:
                yield handle
                if handle is not None:
                    assert handle.plan.stages[0].reducer.names == tuple(names)
                    kept = [tuple(handle.stats.kept(b)[0][0]) for b in range(len(names))]
                    places.update(zip(names, kept, strict=True))

    monkeypatch.setattr(batches, "PatchedModels", Spying)
    return places


def test_batches_halves_and_resumption_change_nothing(loaded, examples, seen, tmp_path) -> None:
    images = [e for e in examples if e.media[0].suffix != ".mp4"]
    assert len(images) > 1
    sweep(*loaded, images, [RANDOM], batch_size=len(images), **HOW)
    first = dict(seen)
    assert first.keys() == {e.id for e in images} and len(set(first.values())) == len(images)
    for size in (1, len(images) - 1):
        seen.clear()
        sweep(*loaded, images, [RANDOM], batch_size=size, **HOW)
        assert seen == first
    sweep(*loaded, images[:1], [RANDOM], tmp_path, **HOW)
    seen.clear()
    sweep(*loaded, images, [RANDOM], tmp_path, **HOW)
    assert seen == {e.id: first[e.id] for e in images[1:]}
    seen.clear()
    measured = Measurement({"": loaded[0]}, loaded[1], batch=len(images))
    measured.run(images, [RANDOM])
    assert seen == first


def test_resumes_where_it_was_killed(loaded, examples, tmp_path, monkeypatch):
    whole = evaluate(*loaded, examples, "uniform", 0.5, tmp_path / "whole", batch_size=2, **HOW)
    from tokencomp.evaluation import batches

    calls = []
    real = batches.generate

    def dies(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(batches, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*loaded, examples, "uniform", 0.5, tmp_path / "cut", batch_size=2, **HOW)
    file = tmp_path / "cut" / "records.jsonl"
    assert len(file.read_text().splitlines()) == 2
    with file.open("a") as handle:
        handle.write('{"id": "half a li')
    calls = []
    monkeypatch.setattr(batches, "generate", lambda *a: calls.append(1) or real(*a))
    run = evaluate(*loaded, examples, "uniform", 0.5, tmp_path / "cut", batch_size=2, **HOW)
    untimed = [[{**r, "seconds": 0} for r in one.records] for one in (run, whole)]
    assert untimed[0] == untimed[1]
    assert len(calls) == 2  # three items were left
    assert len(file.read_text().splitlines()) == len(examples)
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["finished"] is True


def test_only_failed_questions_are_asked_again(loaded, examples, tmp_path):
    copies = [Path(shutil.copy(e.media[0], tmp_path)) for e in examples]
    items = [replace(e, media=(copy,)) for e, copy in zip(examples, copies, strict=True)]

    def ask():
        run = evaluate(*loaded, items, "uniform", 0.5, tmp_path / "run", **HOW)
        assert read_records(tmp_path / "run") == run.records
        return [r.get("prediction", r.get("error")) for r in run.records]

    copies[0].write_bytes(b"no picture")
    assert "damaged" in ask()[0]
    file = tmp_path / "run" / "records.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**r, "prediction": "kept"}) + "\n" for r in rows))
    shutil.copy(examples[0].media[0], copies[0])
    copies[2].touch()
    assert ask() == [one_by_one(loaded, items[0], "uniform", 0.5), *["kept"] * 4]


@pytest.mark.parametrize(
    ("field", "words"),
    [("prompt", "words"), ("answer", "right answer"), ("also", "right answer"), ("media", "pict")],
)
def test_a_folder_with_answers_to_other_questions_is_refused(
    loaded, examples, tmp_path, field, words
):
    """Another question under the same id, or another picture under the same name."""
    picture = Path(shutil.copy(examples[0].media[0], tmp_path / "a.png"))
    example = Example("0", examples[0].prompt, "never said", (picture,))
    evaluate(*loaded, [example], out_dir=tmp_path / "o", **HOW)
    if field == "media":
        shutil.copy(examples[1].media[0], picture)
    else:
        example = replace(example, **{field: ("red",) if field == "also" else "red"})
    with pytest.raises(OptionError, match=rf"the {words}.* of question '0' are not those"):
        evaluate(*loaded, [example], out_dir=tmp_path / "o", **HOW)


@pytest.mark.parametrize(
    ("ids", "size", "message"),
    [("abab", 2, "2 examples have the id 'a'"), ("abb", 2, "id 'b'"), ("a", 0, "batch_size=0")],
)
def test_items_and_batches_that_make_no_sense_are_refused(tmp_path, ids, size, message):
    items = [Example(name, "?", "x") for name in ids]
    with pytest.raises(OptionError, match=message):
        evaluate(None, None, items, out_dir=tmp_path / "o", batch_size=size)
    assert not (tmp_path / "o").exists()


def _other_weights(model, processor, patch):
    weight = next(p for n, p in model.named_parameters() if n.endswith("1.mlp.down_proj.weight"))
    patch.setattr(weight, "data", weight.data + 0.01)


def _other_tower(model, processor, patch):
    weight = next(p for n, p in model.named_parameters() if n.endswith("0.attn.proj.weight"))
    patch.setattr(weight, "data", weight.data + 0.01)


def _other_bound(model, processor, patch):
    patch.setattr(processor.image_processor, "max_soft_tokens", 70, raising=False)


def _other_resolution(model, processor, patch):
    images = processor.image_processor
    patch.setattr(images, "size", {**dict(images.size), "longest_edge": 56 * 56})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda *_: 0.75, "ratio: 0.5 there, 0.75 now"),
        (_other_weights, "differs in weights"),
        (_other_tower, "differs in weights"),
        (_other_resolution, "differs in pixels"),
        (_other_bound, "differs in pixels"),
        (lambda m, p, patch: patch.setattr(Random, "revision", 2), "differs in method"),
        (
            lambda m, p, patch: patch.setattr(Random.__init__, "__defaults__", (3,)),
            "differs in method",
        ),
    ],
    ids=["ratio", "weights", "weights of the tower", "resolution", "bound", "rule", "default"],
)
def test_answers_of_another_run_do_not_count(
    loaded, examples, tmp_path, monkeypatch, changed, message
):
    """Another release may give the same options another meaning."""
    evaluate(*loaded, examples[:1], "random", 0.5, tmp_path, **HOW)
    ratio = changed(*loaded, monkeypatch) or 0.5
    with pytest.raises(OptionError, match=message):
        evaluate(*loaded, examples[:1], "random", ratio, tmp_path, **HOW)


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path):
    """The next record begins a line of its own; a later failure does not replace an answer."""
    file = tmp_path / "records.jsonl"
    file.write_text('{"id": "a", "correct": 1}\n{"id": "b", "corr')
    AnswerStore(tmp_path, {}).append([{"id": "c", "correct": 0}, {"id": "a", "error": "late"}])
    assert read_records(tmp_path) == [{"id": "a", "correct": 1}, {"id": "c", "correct": 0}]


PLUGIN = """
from dataclasses import dataclass
from tokencomp.reducers import ScoreReducer, register_reducer

@register_reducer("of_a_plugin", override=True)
@dataclass(frozen=True)
class OfAPlugin(ScoreReducer):
    def scores(self, tokens):
        return {sign}tokens.features.float().norm(dim=1)
"""


def test_answers_of_a_changed_plugin_do_not_count(loaded, examples, tmp_path, monkeypatch):
    """Another sign is another method under the same name."""
    monkeypatch.syspath_prepend(tmp_path)
    for sign, name in (("", "first"), ("-", "second")):
        (tmp_path / f"{name}.py").write_text(PLUGIN.format(sign=sign))
        importlib.import_module(name)
        if not sign:
            evaluate(*loaded, examples[:1], "of_a_plugin", 0.5, tmp_path / "run", **HOW)
            evaluate(*loaded, examples[:1], "of_a_plugin", 0.5, tmp_path / "run", **HOW)
    with pytest.raises(OptionError, match="differs in method"):
        evaluate(*loaded, examples[:1], "of_a_plugin", 0.5, tmp_path / "run", **HOW)


@pytest.mark.parametrize("lambda_", [False, True])
def test_answers_of_a_changed_notebook_do_not_count(
    loaded, examples, tmp_path, monkeypatch, lambda_
):
    """Its classes are of a module without a file, as in the interactive interpreter."""
    cell = PLUGIN
    if lambda_:
        norms = "(lambda rows: {sign}rows.norm(dim=1))(tokens.features.float())"
        cell = cell.replace("{sign}tokens.features.float().norm(dim=1)", norms)
    notebook, runs = ModuleType("notebook"), itertools.count()
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    for sign in ("", "", "-"):
        exec(compile(cell.format(sign=sign), f"<cell {next(runs)}>", "exec"), vars(notebook))
        if not sign:
            evaluate(*loaded, examples[:1], "of_a_plugin", 0.5, tmp_path, **HOW)
    with pytest.raises(OptionError, match="differs in method"):
        evaluate(*loaded, examples[:1], "of_a_plugin", 0.5, tmp_path, **HOW)


def test_a_manifest_is_of_the_command_that_asked(loaded, examples, tmp_path):
    """A later command with fewer questions asks nothing, and writes nothing."""
    evaluate(*loaded, examples, "uniform", 0.5, tmp_path, **HOW)
    before = (tmp_path / "manifest.json").read_text()
    evaluate(*loaded, examples[:1], "uniform", 0.5, tmp_path, **HOW)
    assert (tmp_path / "manifest.json").read_text() == before
    assert json.loads(before)["summary"]["items"] == len(examples)
