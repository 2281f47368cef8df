"""Shapes, bytes and counts of published pages against arithmetic by hand."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import roofline
from benchmarks.models import profile_shape
from benchmarks.models.shapes import SHAPES, accepted, build
from benchmarks.serving import agents
from tokencomp.adapters.registry import adapter_for

SMALL = ["llava-onevision-0.5b", "qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "nvila-lite-2b"]


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_named_shapes_are_the_published_ones(name: str) -> None:
    """Parameters of one decoder layer, by hand, and the visual tokens of the option."""
    model, inputs = build(name, 400, layers=1, vision_layers=1)
    shape = SHAPES[name]
    d, f, head = shape.hidden, shape.intermediate, shape.hidden // shape.heads
    kv = head * shape.kv_heads
    weights = 2 * d * d + 2 * d * kv + 3 * d * f
    # Qwen3 normalises queries and keys, Qwen2 has biases
    small = 2 * head if shape.family == "qwen3_vl" else d + 2 * kv
    layer = adapter_for(model).layers[0]
    assert sum(p.numel() for p in layer.parameters()) == weights + small + 2 * d
    wanted = {"llava_onevision": 2 * 196 + 1, "vila": 3 * 121}.get(shape.family, 2 * 256)
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == wanted
    assert set(accepted(model, inputs)) <= set(inputs)


@pytest.mark.long
def test_profile_of_a_shape(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    arguments = (
        "llava-onevision-0.5b", "--layers", "1", "--vision-layers", "1", "--tokens", "196",
        "--reducer", "random", "--ratio", "0.5", "--rounds", "1", "-o", str(file),
    )  # fmt: skip
    profile_shape.main(arguments)
    content = json.loads(file.read_text())
    assert "random weights" in content["model"]
    assert content["rows"][0]["tokens_per_layer"] == [197]
    assert content["rows"][0]["kv_bytes"] == (197 + 64) * 2 * 2 * 64 * 4
    assert content["rows"][0]["preprocess_s"] is None


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"


def test_recorded_roofline_is_that_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--out", str(tmp_path / "roofline.csv")])
    roofline.main()
    table = (tmp_path / "roofline.csv").read_text()
    assert table == (FOLDER / "roofline.csv").read_text()
    # 7B layer, 8k rows, half kept, bf16: hidden 3584, cos, sin, K and V of 4 x 128 each, a mask of
    # bool and three int64 positions, read and written once: 4096 rows.
    moved = 2 * 4096 * (2 * (3584 + 2 * 128 + 2 * 4 * 128) + 1 + 3 * 8)
    row = next(r for r in csv.DictReader(table.splitlines()) if "7B layer" in r["case"])
    assert int(row["bytes"]) == moved
    for gpu, rate in (("A100 SXM 80 GB", 2.039), ("H100 SXM", 3.352), ("H200 SXM", 4.8)):
        assert float(row[f"us_{gpu}"]) == pytest.approx(moved / rate * 1e-6, rel=1e-4)
        assert row[f"bound_{gpu}"] == "memory"


@pytest.mark.parametrize("name", agents.POLICIES)
def test_counts_equal_a_cache_of_single_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as lists of tokens, in a smaller case; every token that is not cached counts."""
    monkeypatch.setattr(agents, "HEAD", 5)
    monkeypatch.setattr(agents, "TEXT", 3)
    monkeypatch.setattr(agents, "SCREEN", 40)
    policy, cached, total, every = agents.POLICIES[name], set(), 0, 0
    for step in range(12):
        tokens: list[object] = [("head", n) for n in range(5)]
        for i in range(step + 1):
            kept = int(40 * policy(step, i) + 0.5)
            tokens += [(i, kept, n) for n in range(kept)] + [(i, "text", n) for n in range(3)]
        prefixes = [tuple(tokens[: n + 1]) for n in range(len(tokens))]
        total += sum(prefix not in cached for prefix in prefixes)
        cached.update(prefixes)
        every += len(tokens)
    found = agents.count(policy, 12)
    assert (found["prefilled"], found["uncached"]) == (total, every)
