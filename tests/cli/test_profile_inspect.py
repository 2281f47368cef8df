"""`profile` and `inspect` against counts made by hand."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.console import run

import tokencomp
from tokencomp import zoo
from tokencomp.evaluation.environment import environment
from tokencomp.inputs.prompts import build_inputs
from tokencomp.pages.pictures import survival, tiles
from tokencomp.zoo import SAMPLES
from tokencomp.zoo.shapesqa.items import item

VIDEO = next(SAMPLES.glob("*.mp4"))


def test_profile_of_a_video(folder, capsys):
    code = run(
        "profile", "--model", folder, "--video", VIDEO, "--reducer", "uniform,downscale",
        "--ratio", "0.75", "--rounds", 1, "--json",
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    full, half, small = report["rows"]
    assert code == 0
    assert list(report["file"]) == ["open_cpu_s", "select_cpu_s", "decode_cpu_s", "resize_cpu_s"]
    assert all(seconds > 0 for seconds in report["file"].values())
    assert full["tokens_per_layer"] == [256] * 6 and half["tokens_per_layer"] == [64] * 6
    assert half["achieved_ratio"] == small["achieved_ratio"] == 0.75
    bytes_per_token = 2 * 2 * 64 * 4 * 6
    assert full["kv_bytes"] - half["kv_bytes"] == 192 * bytes_per_token
    spent = full["prefill_s"] + full["reduce_s"]
    assert half["speedup"] == pytest.approx(spent / (half["prefill_s"] + half["reduce_s"]))
    assert half["limit_reached"] == pytest.approx(half["speedup"] / half["flop_limit"])
    assert all(full[k] > 0 for k in ("preprocess_s", "vision_s", "decode_s_per_token"))


def test_inspect_shows_what_is_kept(folder, tmp_path, capsys):
    """Bright patches of the picture are the ones that `uniform` keeps."""
    picture = tmp_path / "white.png"
    Image.new("RGB", (224, 224), "white").save(picture)
    out = tmp_path / "kept.png"
    code = run(
        "inspect", "--model", folder, "--image", picture, "-q", "What color is the circle?",
        "-r", "uniform", "--ratio", "0.75", "-o", out, "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0 and "16 in 6 layers" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out).convert("L")).astype(int)
    kept = sheet[:, -224:].reshape(8, 28, 8, 28)[:, 4:-4, :, 4:-4].mean((1, 3)) > 128
    wanted = np.zeros(64, dtype=bool)
    wanted[[(2 * i + 1) * 64 // 32 for i in range(16)]] = True
    assert (kept == wanted.reshape(8, 8)).all()


def test_inspect_counts_words(folder, tmp_path, capsys):
    """`uniform` at 0.75 keeps cells 2, 6, 10 … of 8×8: columns 2 and 6 of every row."""
    picture, boxes = tmp_path / "white.png", tmp_path / "words.csv"
    Image.new("RGB", (224, 224), "white").save(picture)
    words = [(2, 1, 1), (6, 5, 1), (0, 0, 2), (2, 3, 2), (2, 4, 3)]  # column, row, cells across
    lines = []
    for column, row, wide in words:
        left, top, right, bottom = 28 * column, 28 * row, 28 * (column + wide), 28 * row + 9
        corners = (left, top, right, top, right, bottom, left, bottom)
        lines.append(",".join(map(str, corners)) + ",word, and more")
    boxes.write_text("\n".join(lines))
    code = run(
        "inspect", "--model", folder, "--image", picture, "--boxes", boxes, "-r",
        "uniform,downscale", "--ratio", "0.75", "-o", tmp_path / "a.html", "--max-new-tokens", 1,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "visual tokens: 16 in 6 layers; 60.0% of 5 words" in out
    assert out.count("of 5 words") == 1  # of the methods that drop tokens
    assert "60.0 % of the words" in (tmp_path / "a.html").read_text()


def test_a_picture_is_no_clip(folder, tmp_path, capsys):
    picture = tmp_path / "page.png"
    Image.new("RGB", (224, 224), "white").save(picture)
    assert run("inspect", "--model", folder, "--video", picture) == 2
    assert f"--video {picture} is a picture. Give it as --image" in words_of(capsys)


def words_of(capsys: pytest.CaptureFixture[str]) -> str:
    return re.sub(r"[\s│]+", " ", capsys.readouterr().err).replace("/ ", "/")


def test_kept_patches_of_a_screenshot_can_be_read(folder, tmp_path):
    """Pictures of pages have the size of the image, up to 1,280 pixels, and grow by a click."""
    picture, out = tmp_path / "screen.png", tmp_path / "screen.html"
    Image.new("RGB", (1400, 700), "white").save(picture)
    code = run(
        "inspect", "--model", folder, "--image", picture, "-r", "uniform", "--ratio", "0.5",
        "-o", out, "--max-new-tokens", 1,
    )  # fmt: skip
    page = out.read_text()
    shown = re.findall(r'<label class="zoom".*?base64,([^"]+)"', page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in shown]
    assert code == 0 and len(sizes) >= 2 and {*sizes} == {(1280, 640)}


def test_the_command_of_a_page_can_be_run_again(monkeypatch):
    given = ["inspect", "--question", "What is open?", "--reducer", "condiv(power=2)"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tokencomp", *given])
    assert shlex.split(environment()["command"]) == ["tokencomp", *given]


def test_inspect_shows_what_the_tower_never_saw(folder, tmp_path):
    picture, out = tmp_path / "white.png", tmp_path / "kept.png"
    Image.new("RGB", (224, 224), "white").save(picture)
    code = run(
        "inspect", "--model", folder, "--image", picture, "-r", "uniform", "--ratio", "0.75",
        "--tower-ratio", "0.5", "--tower-reducer", "uniform", "-o", out, "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0
    sheet = np.asarray(Image.open(out)).astype(int)[:, -224:]
    patches = sheet.reshape(8, 28, 8, 28, 3)[:, 4:-4, :, 4:-4].mean((1, 3)).reshape(64, 3)
    red = patches[:, 0] - patches[:, 2]
    assert (red > 40).sum() == 32  # never seen
    assert ((red <= 40) & (patches.mean(1) < 128)).sum() == 16  # seen by the tower alone
    assert (patches.mean(1) > 128).sum() == 16  # seen by the decoder


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
