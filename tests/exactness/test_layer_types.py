"""Decoders with linear, sliding and full layers: prefill, decoding, beams and later turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import IMAGE, Family, text
from support.family.hybrid import HYBRID

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.errors import PlanError, UnsupportedCacheError, UnsupportedModelError

FAMILY_NAMES = sorted(HYBRID)
UNSCORED = "inkling_mm_model"  # its attention logits have a bias that scores do not know
LINEAR = ("lfm2_vl", "minicpmv4_6", "qwen3_5", UNSCORED)  # recurrences or convolutions come first
UNIFORM = make_reducer("uniform")
ENTRY = Plan((Stage(0, 0.4, UNIFORM),))
TOLERANCE = 5e-5


def staged(family: Family) -> Plan:
    """Half leave at entry, and half of the rest between layers as late as the family allows."""
    late = {"gemma4_e": 1, "gemma4": 4}.get(family.name, 2)
    return Plan((Stage(0, 0.5, UNIFORM), Stage(late, 0.25, UNIFORM)))


def ragged(family: Family) -> dict[str, torch.Tensor]:
    """A left-padded batch of two images, one image, and text alone."""
    torch.manual_seed(7)
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(5, 3)],
            [text(4, 4), family.image(1), text(4, 5)],
            [text(9, 6)],
        ]
    )


def check(family: Family, backend: str = "sdpa", steps: int = 4, **setting: Any) -> Any:
    """Compare a generation with the oracle; its handle, first logits and the model."""
    model, inputs = family.build(backend), ragged(family)
    handle, out, masks = oracle.generated(model, family, inputs, steps, **setting)
    merged = oracle.Merged(handle) if setting.get("merge") else None
    away = oracle.deviation(model, family, inputs, out, masks, merged)
    assert away < TOLERANCE
    if merged is not None:  # the weights matter
        plain = oracle.deviation(model, family, inputs, out, masks)
        assert plain > 1e-3
    return handle, out.logits[0], model(**inputs).logits[:, -1]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("backend", "layered"), [("sdpa", True), ("sdpa", False), ("eager", True)])
def test_prefill_and_decode(family: Family, backend: str, layered: bool) -> None:
    """More steps than a window, so that what has left comes out of it."""
    plan = staged(family) if layered else ENTRY
    _, found, plain = check(family, backend, 12, plan=plan)
    assert oracle.difference(found[:2], plain[:2]) > 1e-2  # compression has an effect


WEIGHTED = [n if n in ("gemma3", "gemma4_e") else pytest.param(n, marks=pytest.mark.long)
            for n in FAMILY_NAMES if n != UNSCORED]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_merged_rows(name: str) -> None:
    """In windows, in blocks of images that see each other, and where layers share keys."""
    check(HYBRID[name], steps=12, ratio=0.6, reducer="kcenter", merge=True)


@pytest.mark.parametrize("reducer", ["prune", "pyramiddrop"])
def test_scores_between_layers(family: Family, reducer: str) -> None:
    """With stages before and after layers of every type."""
    if family.name in ("gemma4_e", UNSCORED):
        pytest.skip("its last layers read the keys of the first, or it has no scores")
    handle, *_ = check(family, ratio=0.2, reducer=reducer)
    assert handle.plan.layer_stages


def test_auto_does_not_need_attention_that_the_first_layer_lacks(family: Family) -> None:
    model, linear = family.build(), family.name in LINEAR
    with tokencomp.patch(model, 0.5) as handle, torch.no_grad():
        model(**ragged(family))
        assert handle.stats.ratio > 0.3
    if linear:
        with pytest.raises(PlanError, match="first decoder layer"):
            tokencomp.patch(model, 0.5, reducer="condiv")
    else:
        check(family, ratio=0.2, reducer="condiv")


def test_batch_equals_single_rows(family: Family) -> None:
    """Without padding too: one mask that is None becomes ragged where counts differ."""
    model = family.build()
    rows = [[text(5), family.image(0), text(6, 3)], [text(4, 4), family.image(1), text(4, 5)]]
    width, short = (sum(len(getattr(part, "ids", part)) for part in row) for row in rows)
    rows[1][0] = text(4 + width - short, 4)  # both prompts have one length
    batch = family.batch(rows)
    assert bool(batch["attention_mask"].all())
    with tokencomp.patch(model, 0.6, reducer="uniform"), torch.no_grad():
        together = torch.stack(oracle.generate(model, batch, 4).logits)
        beams = oracle.generate(model, batch, 4, num_beams=3).sequences[:, width:]
        for b, row in enumerate(rows):
            inputs = family.batch([row])
            alone = torch.stack(oracle.generate(model, inputs, 4).logits)
            assert oracle.difference(together[:, b], alone[:, 0]) < TOLERANCE
            lone = oracle.generate(model, inputs, 4, num_beams=3).sequences[0, width:]
            assert torch.equal(beams[b], lone)


def test_second_image(family: Family) -> None:
    """A later turn with an image. The oracle has two turns as well.

    transformers lets no image of a later turn see itself.
    """
    model = family.build()
    first = family.batch([[text(3), family.image(0), text(5, 3)]])
    second = family.batch([[text(2, 9), family.image(1), text(4, 8)]])
    positions = family.positions(model, first)
    own = {"position_ids": family.positions(model, second) + positions.max() + 1}
    length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    turn = {**second, **own, "attention_mask": torch.ones(1, length).long(), "use_cache": True}
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        out = model(**first, position_ids=positions, use_cache=True)
        masks = oracle.kept_columns(handle, first, family.layers)
        found = model(**turn, **{oracle.cache_name(out): oracle.cache_of(out)}).logits[:, -1]
        more = oracle.kept_columns(handle, second, family.layers)
    both = [torch.cat(pair, 1) for pair in zip(masks, more, strict=True)]
    with torch.no_grad():
        with oracle.masked(model, family, masks):
            out = model(**first, position_ids=positions, use_cache=True)
        with oracle.masked(model, family, both):
            cache = {oracle.cache_name(out): oracle.cache_of(out)}
            expected = model(**turn, **cache).logits[:, -1]
    assert oracle.difference(found, expected) < TOLERANCE


def test_videos(family: Family) -> None:
    """Frames with text between them beside an image, and another video, in a ragged batch."""
    if not hasattr(family, "whole_video"):
        pytest.skip("its processor takes no videos")
    model = family.build()
    first = [text(3), family.image(0), text(2), family.whole_video(4), text(5, 3)]
    inputs = family.batch([first, [family.whole_video(4), text(4, 5)], [text(9, 6)]])
    handle, out, masks = oracle.generated(model, family, inputs, 4, plan=ENTRY)
    spans = [s for row in handle.stats.spans for s in row]
    assert [s.modality for s in spans if s.modality == "image"] == ["image"]
    _, rows, columns = spans[-1].grid  # two frames of two videos
    assert sum(s.visual for s in spans if s.modality == "video") == 4 * rows * columns
    assert all(s.grid_known for s in spans)
    away = oracle.deviation(model, family, inputs, out, masks)
    assert away < TOLERANCE


def test_stats_count_keys_and_values(family: Family) -> None:
    """Bytes of the cache that a prefill of one prompt leaves."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(5, 3)]])
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        cache = oracle.cache_of(model(**inputs, use_cache=True))
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    held = sum(2 * k.numel() * k.element_size() for k in keys if k is not None)
    assert handle.stats.kv_bytes_after == held
    assert handle.stats.kv_bytes_before > held


def test_a_ragged_turn_is_refused_beside_linear_layers(family: Family) -> None:
    if family.name not in LINEAR:
        pytest.skip("no linear layers")
    model, inputs = family.build(), ragged(family)
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        out = model(**inputs, use_cache=True)
        rows = [[text(2, 9), family.image(b), text(4, 8)] for b in (0, 1)]
        second = family.batch([*rows, [text(4)]])
        positions = family.positions(model, second) + 40
        masks = [inputs["attention_mask"], second["attention_mask"]]
        turn = {**second, "attention_mask": torch.cat(masks, 1), "position_ids": positions}
        turn[oracle.cache_name(out)] = oracle.cache_of(out)
        with pytest.raises(UnsupportedCacheError, match="linear"):
            model(**turn)


def test_unknown_types_are_refused() -> None:
    model = HYBRID["gemma3"].build()
    model.config.text_config.layer_types = ["compressed_sparse_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="compressed_sparse_attention"):
        tokencomp.patch(model, 0.5, reducer="uniform")


def received(model: Any, family: Family, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """What each visual token receives from the text after it in an attention layer."""
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    weights = [m for m in maps if m is not None]  # of layers with attention
    found = weights[layer] if len(weights) == family.layers else weights[0]
    return found[0].mean(0)[visual[-1] + 1 :][:, visual].mean(0)


def test_scores_of_the_nearest_full_layer(family: Family) -> None:
    """A stage after a linear or sliding layer is scored by the full layer before it.

    So is a second one after another layer without scores, as far as tokens are left.
    """
    if family.name in ("gemma4_e", UNSCORED):
        pytest.skip("its stages stand before the first full layer, or it has no scores")
    model, inputs = family.build("eager"), family.batch([[text(3), family.image(0), text(5, 3)]])
    scored = {"gemma4": 2}.get(family.name, 1)
    top = plans.TextTop()
    stages = [((scored + 2, 0.25, top),)]
    if family.name in LINEAR:
        stages.append(((2, 0.75, UNIFORM), (3, 0.25, top)))
    for some in stages:
        plan = Plan(tuple(Stage(*stage) for stage in some))
        with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
            model(**inputs)
            *before, (kept,) = handle.stats.kept()
        values = received(model, family, inputs, scored)
        left = values[before[0][0]] if before else values
        # values, since some tokens are as good as equal
        highest = left.topk(len(kept)).values
        torch.testing.assert_close(values[kept].sort(descending=True).values, highest)


def test_stages_that_nothing_can_score_are_refused(family: Family) -> None:
    """No layer before the second has attention, where the first one is linear."""
    model, reducer = family.build(), plans.TextTop()
    plan = Plan((Stage(1, 0.25, reducer),))
    if family.name not in LINEAR:
        with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
            model(**ragged(family))  # keys that the window has cut from the cache are read too
            assert handle.stats.ratio > 0.4
        return
    why = "a bias by distance" if family.name == UNSCORED else "none of the layers 0 to 0 has"
    with pytest.raises(PlanError, match=why):
        tokencomp.patch(model, plan=plan)
    images = Plan((Stage(1, 0.0, reducer, by_modality=(("image", 0.25),)),))
    with tokencomp.patch(model, plan=ENTRY) as handle:
        with pytest.raises(PlanError, match=why):
            handle.set(plan=images)
        handle.set(plan=ENTRY)  # the patch is still there
