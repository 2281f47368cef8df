"""Models of published shapes with random weights, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.models import profile_shape
from benchmarks.models.shapes import SHAPES, accepted, build
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
