"""What every family's visual spans are, spelled out; and stages after deepstack features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, IMAGE, VIDEO, Media, text
from support.family.qwen import Qwen3VL

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.errors import PlanError, SpanError, UnknownGridError
from tokencomp.plan.schedules import not_before
from tokencomp.tokens.tokens import VisualSpan


def spans(name: str, *media: Media, before: int = 3) -> list[VisualSpan]:
    """Spans of one prompt: `before` text tokens, the media with a text token between, text."""
    family = FAMILIES[name]
    row: list[Any] = [text(before)]
    for item in media:
        row += [item, text(1)]
    model = family.build()
    with torch.no_grad(), tokencomp.patch(model, 0.3, reducer="uniform") as handle:
        model(**family.batch([[*row, text(4)]]), use_cache=False)
        return handle.stats.spans[0]


def brief(found: list[VisualSpan]) -> list[tuple[Any, ...]]:
    return [(s.start, s.length, s.grid, s.modality) for s in found]


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
def test_mosaic(name: str) -> None:
    found = spans(name, FAMILIES[name].image(0))
    assert brief(found) == [(3, 16, (1, 4, 4), "image"), (19, 72, (1, 8, 8), "image")]
    assert found[1].special == tuple(range(8, 72, 9))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_without_a_grid_are_refused(name: str) -> None:
    """Positions of a later turn that count tokens, as those of text, do not place an image."""
    family = FAMILIES[name]
    inputs = family.batch([[text(3), family.image(0), text(4)]])
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    model, refused = family.build(), pytest.raises(SpanError, match="get_rope_index")
    with torch.no_grad(), tokencomp.patch(model, 0.3, reducer="uniform"), refused:
        model(**inputs, position_ids=positions)


def thin(height: int, width: int, rows: int) -> Media:
    """A picture so thin that the rows of its mosaic, if there are any, have no patches."""
    pixels = torch.randn(1, 5, 3, 16, 16)
    pixels[:, 3:] = 0
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return Media([IMAGE] * (16 + rows), inputs)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_thin_pictures(name: str) -> None:
    tall, wide, last = thin(1000, 3, 4), thin(3, 1000, 0), FAMILIES[name].image(0)
    pixels, sizes = (
        torch.cat([m.inputs[key] for m in (wide, tall, wide, last)])
        for key in ("pixel_values", "image_sizes")
    )
    ids = [token for m in (wide, tall, wide, last) for token in m.ids]
    together = Media(ids, {"pixel_values": pixels, "image_sizes": sizes})
    assert brief(spans(name, tall)) == [(3, 20, (1, 4, 4), "image")]
    assert spans(name, tall)[0].special == tuple(range(16, 20))
    assert brief(spans(name, wide)) == [(3, 16, (1, 4, 4), "image")]
    base = (1, 4, 4), "image"
    assert brief(spans(name, together)) == [
        (3, 16, *base), (19, 20, *base), (39, 16, *base), (55, 16, *base),
        (71, 72, (1, 8, 8), "image"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_mosaic_without_line_breaks_is_refused(name: str) -> None:
    """A base tile and five more tokens, as features from elsewhere."""
    model = FAMILIES[name].build()
    types = torch.tensor([[0] * 3 + [1] * (16 + 5) + [0] * 4])
    embeds = torch.randn(1, types.shape[1], model.get_input_embeddings().embedding_dim)
    refused = pytest.raises(SpanError, match="image_newline")
    with torch.no_grad(), tokencomp.patch(model, 0.5), refused:
        model(inputs_embeds=embeds, mm_token_type_ids=types)


def test_next_video() -> None:
    """Two videos side by side are two spans."""
    family = FAMILIES["llava_next_video"]
    a, b = family.video(3), family.video(3)
    pixels = torch.cat([a.inputs["pixel_values_videos"], b.inputs["pixel_values_videos"]])
    pair = Media(a.ids[:-1] + b.ids, {"pixel_values_videos": pixels})
    found = spans("llava_next_video", pair)
    assert brief(found) == [(3, 12, (3, 2, 2), "video"), (15, 12, (3, 2, 2), "video")]


def test_vila() -> None:
    """Separators are special, and a video is one span."""
    family = FAMILIES["vila"]
    found = spans("vila", family.image(1), family.video(3), family.video(2))
    assert brief(found) == [
        (3, 17, (1, 4, 4), "image"),
        (20, 17, (1, 4, 4), "image"),
        (38, 51, (3, 4, 4), "video"),
        (90, 34, (2, 4, 4), "video"),
    ]
    assert found[2].special == (16, 33, 50)


def test_vila_pooled_video() -> None:
    """Averaged blocks of 2×2×2 tokens: half of the frames, a quarter of each."""
    family = FAMILIES["vila"]
    model = family.build()
    model.config.video_pool = (2, 2, 2)
    media = family.video(4)
    frame = [*[VIDEO] * 4, media.ids[-1]]
    inputs = family.batch([[text(3), Media(frame * 2, media.inputs), text(4)]])
    with torch.no_grad(), tokencomp.patch(model, 0.3, reducer="uniform") as handle:
        model(**inputs)
        found = handle.stats.spans[0]
    assert brief(found) == [(3, 10, (2, 2, 2), "video")]
    assert found[0].special == (4, 9)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_tile_that_the_config_does_not_describe_has_no_grid(name: str) -> None:
    """Its tokens are counted where the model encodes it; nothing says how they lie in it."""
    family = FAMILIES[name]
    model = family.build()
    vision = model.config.vision_config
    vision.patch_size = [3, 3] if isinstance(vision.patch_size, (list, tuple)) else 3
    inputs = family.batch([[text(3), family.image(0), text(4)]])
    with torch.no_grad(), tokencomp.patch(model, 0.3, reducer="uniform") as handle:
        model(**inputs)
        assert {(s.length, s.grid_known) for s in handle.stats.spans[0]} == {(16, False)}
        handle.set(reducer="pool")
        with pytest.raises(UnknownGridError, match="pool"):
            model(**inputs)


class Deep(Qwen3VL):
    deepstack = (0, 2)


def test_early_layer_stage_is_refused() -> None:
    plan = Plan((Stage(1, 0.5, make_reducer("uniform")),))
    with pytest.raises(PlanError, match="from layer 2 on"):
        tokencomp.patch(Deep().build(), plan=plan)
    tokencomp.patch(Deep().build(), plan=Plan((Stage(2, 0.5, make_reducer("uniform")),)))
    tokencomp.patch(FAMILIES["qwen2_vl"].build(), plan=plan)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("schedule", ["aim", "pyramid", "fastv"])
def test_schedules_wait(ratio: float, schedule: str) -> None:
    """A named reducer moves its stages and keeps its ratio; and it runs."""
    family = Deep()
    model = family.build()
    with tokencomp.patch(model, ratio, reducer="prune", schedule=schedule) as handle:
        assert all(s.layer == 0 or s.layer >= 2 for s in handle.plan.stages)
        assert handle.plan.ratio(4) == pytest.approx(ratio)
        with torch.no_grad():
            model(**family.batch([[text(3), family.image(0), text(5)]]))


@pytest.mark.parametrize("first", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [4, 28, 36])
@pytest.mark.parametrize("reducer", ["prune", "aim"])
def test_not_before(first: int, layers: int, reducer: str) -> None:
    for ratio in (0.05, 0.3, 0.5, 0.75, 0.9, 0.95):
        plan = make_reducer(reducer).plan(ratio, layers)
        moved = not_before(plan, first, layers)
        assert moved.ratio(layers) == pytest.approx(ratio)
        assert all(s.layer == 0 or s.layer >= first for s in moved.stages)
        if all(s.layer == 0 or s.layer >= first for s in plan.stages):
            assert moved is plan


def test_text_between_frames_stays() -> None:
    """It survives a stage that removes every visual token, and is not counted."""
    family = Deep()
    model = family.build()
    inputs = family.batch([[text(3), family.video(4), text(5)]])
    uniform = make_reducer("uniform")
    plan = Plan((Stage(0, 0.5, uniform), Stage(3, 0.0, uniform)))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        model(**inputs)
        stats = handle.stats
    assert stats.tokens_before == [16]
    assert stats.tokens_after == [[8, 8, 8, 0]]
    assert stats.kept()[1] == [[8, 9, 10, 11, 12]]
    assert len(stats.kept()[0][0]) == 8 + 5
