"""`profile` and `inspect` against counts made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support.console import run

from tokencomp.zoo import SAMPLES

VIDEO = next(SAMPLES.glob("*.mp4"))
IMAGE = next(SAMPLES.glob("*.jpg"))


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
    assert code == 0 and "16×6" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out).convert("L")).astype(int)
    kept = sheet[:, -224:].reshape(8, 28, 8, 28)[:, 4:-4, :, 4:-4].mean((1, 3)) > 128
    wanted = np.zeros(64, dtype=bool)
    wanted[[(2 * i + 1) * 64 // 32 for i in range(16)]] = True
    assert (kept == wanted.reshape(8, 8)).all()


def test_inspect_of_a_video(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    code = run(
        "inspect", "--model", folder, "--video", VIDEO, "-q", "What color is the circle?",
        "--reducer", "uniform", "--ratio", "0.5", "-o", page, "--frames", "scorer:aks:8",
        "--max-new-tokens", 2,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "256×6" in out and "128×6" in out
    assert VIDEO.name in page.read_text()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0.5", "--tower-ratio", "0.6"), "tower_ratio=0.6"),
        (("--ratio", "0.5", "--tower-ratio", "x"), "tower_ratio='x'"),
        (
            ("--ratio", "0.5", "--tower-ratio", "0.2", "--tower-reducer", "bipartite"),
            "merges tokens",
        ),
        (("--ratio", "0.5", "--tower-reducer", "kcenter"), "no effect with --tower-ratio 0"),
        (("--ratio", "0.5", "-r", "kcenter", "--set", "pool=1"), "pool=1 has no effect in this"),
        (
            ("--ratio", "0.5", "-r", "prune", "--set", "schedule=fastv", "--set", "start=0.2"),
            "start=0.2 has no effect with schedule='fastv'",
        ),
        (("--ratio", "audio=0.5"), "a ratio of audio has no effect"),
    ],
)
def test_bad_options(folder, capsys, options, message):
    assert run("inspect", "--model", folder, "--image", IMAGE, *options) != 0
    assert message in " ".join(capsys.readouterr().err.split())
