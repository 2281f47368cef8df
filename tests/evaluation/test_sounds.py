"""Questions about sound files: read, asked through the command line, and what is refused."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from support.console import run

from recipes.sounds.model import TOKENS, build, build_tokenizer, load, save
from tokencomp.errors import MediaError
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.questions import Example, modality_of
from tokencomp.inputs.sounds import RATE, load_sound


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
