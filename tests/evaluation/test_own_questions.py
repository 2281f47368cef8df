"""`tokencomp eval --data questions.jsonl`: questions about pictures, clips and sound files."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.console import run

from recipes.sounds.model import TOKENS, build, build_tokenizer, load, save
from tokencomp.errors import MediaError
from tokencomp.evaluation.group_runs import find_runs
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.questions import Example, modality_of
from tokencomp.inputs.sounds import RATE, load_sound
from tokencomp.pages.report import lines

SETTINGS = ("full", "random-0.75", "random-0.75-seed=1", "random-0.75-seed=2", "uniform-0.75",
            "downscale-0.75", "condiv-0.75")  # fmt: skip


@pytest.fixture
def questions(examples, loaded, tmp_path) -> tuple[Path, list[str]]:
    """A file of four lines, one of them blank, and what the full model answers to each."""
    said, lines = [], []
    for k, e in enumerate(examples[:2] + examples[3:4]):
        said.append(generate(*loaded, build_inputs(loaded[1], [e.load(8)], [e.prompt]), 16)[0])
        answer = said[-1] if k else "something else"
        lines.append(json.dumps({"question": e.prompt, "answer": answer, "media": str(e.media[0])}))
    file = tmp_path / "my.jsonl"
    file.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return file, said


@pytest.fixture
def evaluate(questions, folder, tmp_path) -> Callable[..., int]:
    def call(*more: object) -> int:
        known = ("--data", questions[0], "--model", folder, "--ratio", "0.75", "--device", "cpu")
        return run("eval", *known, "-o", tmp_path / "runs", *more)

    return call


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_every_baseline_answers_and_the_report_has_intervals(questions, evaluate, tmp_path, capsys):
    assert evaluate("-r", "condiv") == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == set(SETTINGS)
    rows = records(tmp_path / "runs" / "full")
    assert [r["prediction"] for r in rows] == questions[1]
    assert [r["correct"] for r in rows] == [False, True, True]
    for name in SETTINGS[1:]:
        assert all(abs(r["ratio"] - 0.75) < 0.1 for r in records(tmp_path / "runs" / name)), name
    capsys.readouterr()
    table = {line.run.label: line for line in lines(find_runs([tmp_path / "runs"]))}
    assert table["full"].accuracy == pytest.approx(2 / 3)
    assert table["condiv"].retention.items == 3
    assert table["condiv"].comparisons.seeds == 3


def test_a_limit_shows_the_items_of_this_call(questions, evaluate, tmp_path, capsys):
    """Folders of an earlier call hold three answers; now the first one alone is asked, and wrong.

    The full model answers 0 of 1 right, and not 2 of 3.
    """
    plain = ("--no-baselines", "-r", "uniform")
    assert evaluate(*plain) == 0
    capsys.readouterr()
    assert evaluate(*plain, "--limit", 1) == 0
    row, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("full")]
    assert row.split()[:6] == ["full", "0", "0.000", "100%", "1", "0.0%"]
    assert len(records(tmp_path / "runs" / "full")) == 3


def test_budgets_stand_beside_ratios(questions, evaluate, folder, tmp_path, capsys):
    """Baselines have the same budgets, and the report takes runs of both kinds."""
    assert evaluate("--no-baselines", "-r", "uniform") == 0
    runs, known = tmp_path / "runs", ("--data", questions[0], "--model", folder, "--device", "cpu")
    assert run("eval", *known, "-r", "uniform", "--budget", "32,9", "-o", runs, "--seeds", 1) == 0
    assert {p.name for p in runs.iterdir()} == {
        "full", "uniform-0.75", *(f"{r}-budget={n}" for r in ("random", "uniform") for n in (9, 32))
    }  # fmt: skip
    for n in (9, 32):
        rows = [records(runs / f"{name}-budget={n}") for name in ("random", "uniform")]
        assert [r["ratio"] for r in rows[0]] == [r["ratio"] for r in rows[1]]
    assert run("report", runs, "-o", tmp_path / "page.html") == 0
    table = find_runs([runs])
    assert [r.ratio for r in table if r.label == "uniform"] == [0.75, "budget=9", "budget=32"]


def test_answers_end_at_a_limit_that_runs_do_not_mix(questions, evaluate, tmp_path, capsys):
    plain = ("--no-baselines", "-r", "uniform")
    assert evaluate(*plain) == 0
    line = json.loads(questions[0].read_text().split("\n")[0])
    questions[0].write_text(json.dumps({**line, "answer": "red"}) + "\n")
    assert evaluate(*plain, "--max-new-tokens", 4, "-o", tmp_path / "four") == 0
    (row,) = records(tmp_path / "four" / "full")
    assert questions[1][0].startswith(row["prediction"]) and row["prediction"] != questions[1][0]
    capsys.readouterr()
    both = tmp_path / "runs" / "full", tmp_path / "four" / "full"
    assert run("report", *both, "-o", tmp_path / "page.html") == 2
    assert "max_new_tokens: 16 and 4" in capsys.readouterr().err.replace("\n", " ")


def test_questions_that_no_answer_within_the_limit_can_meet(
    questions, loaded, evaluate, tmp_path, capsys
):
    """One word of the tokenizer per token: 17 and 20 of them, and other answers that are short."""
    words = " ".join(["red"] * 20)
    assert len(loaded[1].tokenizer(words)["input_ids"]) == 20
    line = json.loads(questions[0].read_text().split("\n")[0])
    answers = [["red", words], f"B. {words}", words[:-12], words]
    rows = [{**line, "answer": one, "id": f"number {k}"} for k, one in enumerate(answers)]
    questions[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate("-r", "uniform") == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "'number 2'" in said and "--max-new-tokens 20" in said
    assert not (tmp_path / "runs").exists()
    assert evaluate("-r", "uniform", "--max-new-tokens", 19) == 2
    assert "'number 3'" in capsys.readouterr().err


def write_wav(path: Path, channels: np.ndarray, rate: int) -> Path:
    """16-bit samples (n, channels) in [-1, 1]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels * 32767).round().astype("<i2").tobytes())
    return path


def tone(rate: int, seconds: float, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [RATE, 44_100, 8_000])
def test_files_of_any_rate_become_mono_at_16_khz(tmp_path: Path, rate: int) -> None:
    left = tone(rate, 0.5)
    path = write_wav(tmp_path / "two.wav", np.stack([left, 0 * left], 1), rate)
    samples = load_sound(path)
    assert samples.dtype == np.float32 and abs(len(samples) - RATE / 2) <= 32
    assert modality_of(samples) == "audio"
    inner = slice(200, len(samples) - 200)  # filters ring at both ends
    np.testing.assert_allclose(samples[inner], tone(RATE, 1)[: len(samples)][inner] / 2, atol=0.01)


def test_files_without_sound_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF of something else")
    write_wav(tmp_path / "empty.wav", np.zeros((0, 1)), RATE)
    for name, reason in (("missing", "no such"), ("broken", "damaged"), ("empty", "empty")):
        with pytest.raises(MediaError, match=rf"{name}\.wav: .*{reason}"):
            Example("1", "?", "yes", (tmp_path / f"{name}.wav",)).load(8)


def test_command_asks_about_sound_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Answers are those of the stock classes; a file that is damaged counts as failed."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    save(build(tokenizer), tokenizer, tmp_path / "model")
    lines = []
    for name, seconds in (("long", 8.0), ("short", 4.0)):
        write_wav(tmp_path / f"{name}.wav", tone(RATE, seconds)[:, None], RATE)
        lines.append({"question": "Is there a beep?", "answer": "yes", "media": f"{name}.wav"})
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    lines.append({"question": "Is there a hum?", "answer": "no", "media": "bad.wav"})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    known = ("--data", file, "--model", tmp_path / "model", "--ratio", "0.75", "--device", "cpu")
    assert run("eval", *known, "-r", "fusion", "-o", tmp_path / "runs", "--seeds", 1) == 0
    records = {}
    for folder in (tmp_path / "runs").iterdir():
        rows = [json.loads(x) for x in (folder / "records.jsonl").read_text().splitlines()]
        records[folder.name] = sorted(rows, key=lambda r: r["id"])
    assert {*records} == {"full", "random-0.75", "uniform-0.75", "downscale-0.75", "fusion-0.75"}
    model, processor = load(tmp_path / "model")
    for name, rows in records.items():
        assert ["error" in row for row in rows] == [False, False, True]
        for row, seconds in zip(rows, (8, 4), strict=False):
            whole = TOKENS * seconds // 8
            assert row["visual_tokens"] == whole and row["kind"] == "audio"
            assert row["ratio"] == pytest.approx(0.75 * (name != "full"), abs=0.02)
    for row, line in zip(records["full"][:2], lines, strict=False):
        samples = load_sound(tmp_path / line["media"])
        text = f"<|audio_bos|><|AUDIO|><|audio_eos|>\n{line['question']}\nAnswer:"
        inputs = processor(text=[text], audio=[samples], sampling_rate=RATE, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["prediction"] == said.strip()
    assert not list((tmp_path / "runs").rglob("*.jpg"))
    capsys.readouterr()
    assert run("report", tmp_path / "runs", "-o", tmp_path / "page.html") == 0


def test_models_that_do_not_listen_refuse_sounds(loaded) -> None:
    """Their processors would leave the sound out, and the model would answer without it."""
    with pytest.raises(MediaError, match="takes no sounds"):
        build_inputs(loaded[1], [[tone(RATE, 1).astype(np.float32)]], ["What is heard?"])
