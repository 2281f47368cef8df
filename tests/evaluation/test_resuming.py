"""Stored answers: when a run takes them up, and when it asks again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.embedded import HOW, one_by_one

from tokencomp.errors import OptionError
from tokencomp.evaluation import Example, evaluate
from tokencomp.evaluation.environment import git
from tokencomp.evaluation.store import read_records
from tokencomp.reducers.random import Random


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
    assert "neither an image" in ask()[0]
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


def test_a_full_disk_is_one_message_and_loses_no_answer(loaded, examples, tmp_path):
    """The last batch does not fit into the file; the same call goes on behind it."""
    items = [replace(e, id=f"{k}/{e.id}") for k in range(4) for e in examples[:3]]
    whole = evaluate(*loaded, items, "uniform", 0.5, tmp_path / "whole", batch_size=4, **HOW)
    room = (tmp_path / "whole" / "records.jsonl").stat().st_size - 100
    assert room > (tmp_path / "whole" / "manifest.json").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OptionError, match=r"File too large.*make room"):
            evaluate(*loaded, items, "uniform", 0.5, tmp_path / "full", batch_size=4, **HOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_records(tmp_path / "full")) == len(items) - 1
    again = evaluate(*loaded, items, "uniform", 0.5, tmp_path / "full", batch_size=4, **HOW)
    assert [r["prediction"] for r in again.records] == [r["prediction"] for r in whole.records]


def test_looking_at_the_commit_leaves_the_index_of_the_checkout(tmp_path):
    """A lock, left behind by a full disk, would stop the user's own git commands."""

    def outside(*args):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True, capture_output=True)

    file, index = tmp_path / "a.txt", tmp_path / ".git/index"
    file.write_text("a")
    outside("init")
    outside("add", "a.txt")
    os.utime(file, (10**9, 10**9))
    before = index.read_bytes()
    assert git(tmp_path, "status", "--porcelain") == "A  a.txt"
    assert index.read_bytes() == before
    outside("status")
    assert index.read_bytes() != before


def _other_weights(model, processor, patch):
    weight = next(p for n, p in model.named_parameters() if n.endswith("1.mlp.down_proj.weight"))
    patch.setattr(weight, "data", weight.data + 0.01)


def _other_tower(model, processor, patch):
    weight = next(p for n, p in model.named_parameters() if n.endswith("0.attn.proj.weight"))
    patch.setattr(weight, "data", weight.data + 0.01)


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
        (lambda m, p, patch: patch.setattr(Random, "revision", 2), "differs in method"),
        (
            lambda m, p, patch: patch.setattr(Random.__init__, "__defaults__", (3,)),
            "differs in method",
        ),
    ],
    ids=["ratio", "weights", "weights of the tower", "resolution", "rule", "default of an option"],
)
def test_answers_of_another_run_do_not_count(
    loaded, examples, tmp_path, monkeypatch, changed, message
):
    """Another release may give the same options another meaning."""
    evaluate(*loaded, examples[:1], "random", 0.5, tmp_path, **HOW)
    ratio = changed(*loaded, monkeypatch) or 0.5
    with pytest.raises(OptionError, match=message):
        evaluate(*loaded, examples[:1], "random", ratio, tmp_path, **HOW)
