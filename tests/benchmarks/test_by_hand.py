"""Shapes, bytes, FLOPs and calls against arithmetic by hand."""

from __future__ import annotations

import csv
from typing import Any

import pytest

import tokencomp
from benchmarks.accuracy.work import vision_work
from benchmarks.kernels import roofline
from benchmarks.kernels.calls import (
    CASES,
    OFF,
    REDUCERS,
    decode_step,
    measure,
    tiny_model,
)
from benchmarks.models.shapes import SHAPES, accepted, build
from tokencomp.adapters.registry import adapter_for
from tokencomp.inputs.prompts import build_inputs

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


def test_the_roofline_is_the_data_that_must_move() -> None:
    (table,) = roofline.files().values()
    # 7B layer, 8k rows, half kept, bf16: hidden 3584, cos, sin, K and V of 4 x 128 each, a mask of
    # bool and three int64 positions, read and written once: 4096 rows.
    moved = 2 * 4096 * (2 * (3584 + 2 * 128 + 2 * 4 * 128) + 1 + 3 * 8)
    row = next(r for r in csv.DictReader(table.splitlines()) if "7B layer" in r["case"])
    assert int(row["bytes"]) == moved
    for gpu, rate in (("A100 SXM 80 GB", 2.039), ("H100 SXM", 3.352), ("H200 SXM", 4.8)):
        assert float(row[f"us_{gpu}"]) == pytest.approx(moved / rate * 1e-6, rel=1e-4)
        assert row[f"bound_{gpu}"] == "memory"


CALLS_PER_IMAGE = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("reducer", REDUCERS)
def test_a_prefill_does_not_grow_with_images(model: Any, reducer: str) -> None:
    """A further image or sample costs next to nothing."""
    shapes = ((1, 1), (2, 2), (3, 3))  # images × samples
    one, four, nine = (measure(model, reducer, *shape)[0] for shape in shapes)
    assert nine.calls - four.calls <= (9 - 4) * CALLS_PER_IMAGE
    assert one.reads == four.reads == nine.reads


@pytest.mark.parametrize("reducer", CASES)
def test_a_decode_step_adds_the_weights_of_merged_rows_and_no_more(
    model: Any, reducer: str
) -> None:
    """Merged weights: a logarithm, a pad for the new row, two views; and where SDPA gets a mask,
    transformers packs grouped heads with one view per layer. Nothing else adds a call.
    """
    merges = reducer == "auto"
    layers = len(adapter_for(model).layers)
    assert decode_step(model, reducer) == ((4 + layers) * merges, 0)


def test_ratio_0_adds_nothing_to_a_prefill(model: Any) -> None:
    for shape in ((1, 1), (3, 2)):
        row = measure(model, OFF, *shape)[0]
        assert (row.calls, row.reads) == (0, 0)


@pytest.fixture
def inputs(loaded, examples):
    return build_inputs(loaded[1], [examples[0].load(8)], [examples[0].prompt])


def by_hand(model, patches: int) -> tuple[int, int, int]:
    """FLOPs of a Qwen2-VL tower's embedding, blocks and merger for one image of so many patches."""
    config = model.config.vision_config
    d, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    block = 2 * patches * (4 * d * d + 2 * d * hidden) + 4 * patches**2 * d
    merged = d * config.spatial_merge_size**2
    merger = 2 * (patches // config.spatial_merge_size**2) * merged * (merged + config.hidden_size)
    return 2 * patches * pixels * d, config.depth * block, merger


def test_tower_and_projector_are_the_products_written_out(loaded, inputs):
    model, patches = loaded[0], int(inputs["image_grid_thw"].prod())
    counted = vision_work(model, inputs)
    embedding, blocks, merger = by_hand(model, patches)
    assert (counted.tower, counted.projector) == (embedding + blocks, merger)
    assert counted.reduce == 0
    with tokencomp.patch(model, 0.5, reducer="uniform"):
        assert vision_work(model, inputs) == counted


def test_a_tower_stage_counts_as_its_statistics_say(loaded, inputs):
    """The statistics leave out the embedding, which the half that is dropped does not need."""
    model, patches = loaded[0], int(inputs["image_grid_thw"].prod())
    embedding = by_hand(model, patches)[0]
    full = vision_work(model, inputs)
    with tokencomp.patch(model, 0.5, tower_ratio=0.5, tower_reducer="uniform") as handle:
        short = vision_work(model, inputs)
        (before, after), (_, projected) = handle.stats.tower_flops, handle.stats.projector_flops
    assert short.projector == projected
    assert full.tower - short.tower == before - after + embedding // 2
