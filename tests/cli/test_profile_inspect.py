"""`profile` and `inspect` against counts made by hand."""

from __future__ import annotations

import json
import re

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


def test_inspect_page_has_a_picture_per_stage(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    code = run(
        "inspect", "--model", folder, "--image", IMAGE, "-q", "What color is the circle?",
        "-r", "prune", "--ratio", "0.5", "-o", page, "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0
    content = page.read_text()
    assert "from layer 1 on" in content and not re.search(r'(src|href)="(?!data:|#)', content)


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


@pytest.mark.parametrize(
    "args, message",
    [
        (["profile"], "nothing to look at"),
        (["inspect"], "nothing to look at"),
    ],
)
def test_mistakes(args, message, capsys):
    assert run(*args) == 2
    assert message in capsys.readouterr().err


def test_profile_of_the_vision_tower(folder, capsys):
    """The bar of all steps goes to standard error; the table has the ratio of the tower."""
    code = run(
        "profile", "--model", folder, "--image", IMAGE, "--reducer", "uniform", "--ratio", "0.75",
        "--tower-ratio", "0.5", "--rounds", 1,
    )  # fmt: skip
    out = capsys.readouterr()
    assert code == 0 and "tower ratio reached" in out.out and "0.500" in out.out
    assert "Before the model, of CPU time: open " in out.out
    assert " 6/6 " in out.err and "6/6" not in out.out


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


def test_inspect_says_in_words_what_was_kept():
    from types import SimpleNamespace

    from tokencomp.cli.inspect import in_words
    from tokencomp.method import MethodSpec

    def answer(name, ratio, layers, text, **spec):
        cost = SimpleNamespace(per_layer=layers, flops=sum(layers), kv_bytes=2 * sum(layers))
        return SimpleNamespace(
            setting=SimpleNamespace(name=name, asked=MethodSpec(name, ratio, **spec).asked),
            cost=cost,
            text=text,
        )

    full = answer("uniform", 0.0, [64, 64], "red")
    words = in_words(answer("prune", 0.75, [32, 0], "red "), full)
    assert "prune at ratio 0.75: a decoder layer sees 16 of 64 visual tokens" in words
    assert "25% of the decoder's work" in words and words.endswith("The answer stays the same.")
    words = in_words(answer("prune", 0.0, [32, 0], "red ", budget=16), full)
    assert "prune at budget=16: a decoder layer sees 16" in words
    assert in_words(answer("prune", 0.75, [32, 0], "blue"), full).endswith(
        "The answer differs from that of the full model."
    )
