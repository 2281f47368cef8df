"""Counted FLOPs against products that are written out by hand."""

from __future__ import annotations

import itertools

import pytest
from support.embedded import HOW

import tokencomp
from benchmarks.accuracy.work import FlopClock, _sees_attention, vision_work, work_parts
from tokencomp.evaluation import Setting, grid, sweep
from tokencomp.evaluation.timing import prefill_split
from tokencomp.inputs.prompts import build_inputs


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


def test_a_tower_whose_attention_is_not_seen_has_no_number(loaded, inputs, monkeypatch):
    config = loaded[0].model.visual.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    assert not _sees_attention(loaded[0])
    monkeypatch.undo()
    assert _sees_attention(loaded[0])


def test_reducing_counts_the_products_inside_the_kernels(loaded, inputs):
    """DivPrune at entry computes all similarities once: 2·L²·D in spans of up to 512 rows."""
    model, tokens = loaded[0], 64
    with tokencomp.patch(model, 0.5, reducer="divprune"):
        work = vision_work(model, inputs)
    products = 2 * tokens**2 * model.config.get_text_config().hidden_size
    assert work.reduce >= products


def test_reducing_counts_the_keys_of_a_reducer_that_reads_attention(loaded, inputs):
    """The counter walks all modules of a layer, also while its queries and keys are read."""
    model, tokens = loaded[0], 64
    with tokencomp.patch(model, 0.5, reducer="condiv"):
        work = vision_work(model, inputs)
    text = model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    assert work.reduce >= 2 * tokens * text.hidden_size * width


def test_parts_of_the_first_image_and_the_first_video(loaded, examples):
    """The decoder's are those of the answers; only smaller media make less work of the tower."""
    settings = grid(["uniform", "downscale"], [0.75])
    runs = sweep(*loaded, examples, settings, **HOW)
    work, full = work_parts(*loaded, settings, examples, 8), Setting()
    is_video = [e.media[0].suffix == ".mp4" for e in examples]
    for setting, kind in itertools.product(settings, ("image", "video")):
        record = runs[setting].records[is_video.index(kind == "video")]
        parts, whole = work[setting][kind], work[full][kind]
        expected = (record["flops"], record["decode_flops"], record["kv_bytes"])
        assert (parts["prefill"], parts["decode"], parts["kv_bytes"]) == expected
        for part in ("tower", "projector"):
            assert (parts[part] < whole[part]) is (setting.reducer == "downscale")


def test_an_unpatched_model_spends_nothing_on_reducing(loaded, inputs):
    """In floating-point operations, which do not depend on what else the machine does."""
    for ratio in (0.0, 0.5):
        with tokencomp.patch(loaded[0], ratio, reducer="divprune"), FlopClock() as clock:
            split = prefill_split(loaded[0], inputs, clock)
        assert (split.reduce > 0) == (ratio > 0) and split.prefill > 0
    with FlopClock() as clock:
        assert prefill_split(loaded[0], inputs, clock).reduce == 0
