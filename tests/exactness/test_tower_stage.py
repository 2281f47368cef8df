"""A stage in the vision tower gives the run whose tower and decoder ignore what it drops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import transformers
from support import oracle, plans, tower
from support.families import FAMILIES, Family, text
from support.family.hybrid import Qwen35, Qwen35Moe
from support.prompts import prompt
from torch import Tensor, nn

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.adapters.towers.base import attention_blocks
from tokencomp.errors import UnsupportedModelError
from tokencomp.reducers import ScoreReducer

# The mixture of experts of Qwen3-VL takes no float64; its tower is that of Qwen3-VL.
FAMILY_NAMES = sorted(set(FAMILIES) - {"qwen3_vl_moe"})
RANDOM = make_reducer("random")


def prompts(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """Ragged: images of different grids and a video; text behind every one of them."""
    first = [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)]
    return tower.like(model, family.batch([first, [family.video(4), text(3, 4)], [text(9, 6)]]))


def staged(block: int, fraction: float = 0.6, name: str = "both") -> Plan:
    decoder = plans.make(name, 4).stages
    return Plan(
        tuple(Stage(s.layer, s.fraction * fraction, s.reducer) for s in decoder),
        TowerStage(block, fraction, RANDOM),
    )


def test_drop_equals_mask(family: Family) -> None:
    compare(family, "sdpa", staged(0))


PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.filterwarnings("error::tokencomp.errors.RatioWarning")
@pytest.mark.parametrize(("budget", "reducer"), [(8, "random"), (4, "pyramiddrop")])
@pytest.mark.parametrize("name", PACKED)
def test_drop_equals_mask_under_a_budget(name: str, budget: int, reducer: str) -> None:
    """Items of 8 and 16 tokens keep as many cells, and then tokens, as the budget allows."""
    stats = compare(FAMILIES[name], "sdpa", budgeted(FAMILIES[name], budget, reducer))
    cells = {8: 13, 4: 6}[budget]
    sizes = [math.prod(span.grid) for row in stats.spans for span in row]
    texts = [len(span.text) for row in stats.spans for span in row]
    left = [len(kept) for b in range(2) for kept in stats.tower_kept(b)]
    assert left == [min(size, cells) + n for size, n in zip(sizes, texts, strict=True)]
    if reducer == "random":
        counts = [count for row in stats.counts for (count,) in row]
        assert counts == [min(size, budget) for size in sizes]
    asked = 1 - sum(min(size, budget) for size in sizes) / sum(sizes)
    assert stats.requested_ratio == pytest.approx(asked)
    assert asked <= stats.ratio + 1e-9 < asked + len(sizes) / sum(sizes)


@pytest.mark.parametrize("name", PACKED)
def test_what_an_item_keeps_under_a_budget_follows_from_it_alone(name: str) -> None:
    """Alone, after another image, and in a ragged batch with a video."""
    family = FAMILIES[name]
    model, image = family.build(), [family.image(0), text(4, 2)]
    batches = [
        [[text(3), *image]],
        [[text(3), family.image(1), *image]],
        [[family.video(4), text(2)], [text(3), *image]],
    ]
    with tokencomp.patch(model, plan=budgeted(family, 5, "kcenter")) as handle, torch.no_grad():
        found = []
        for batch in batches:
            model(**family.batch(batch))
            last = len(batch) - 1
            found.append((handle.stats.tower_kept(last)[-1], handle.stats.kept(last)[0][-1]))
    assert found[0] == found[1] == found[2] and [*map(len, found[0])] == [8, 5]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {*PACKED, "qwen3_vl_moe"}))
def test_towers_of_pictures_of_one_size_refuse_budgets(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(UnsupportedModelError, match="with a budget"):
        tokencomp.patch(model, budget=5, tower_ratio="auto")


def budgeted(family: Family, budget: int, reducer: str) -> Plan:
    """The plan of a budget with tower_ratio="auto"."""
    setting = dict(budget=budget, reducer=reducer, tower_ratio="auto", tower_reducer="random")
    with tokencomp.patch(family.build(), **setting) as handle:
        return handle.plan


@pytest.mark.long
@pytest.mark.parametrize("block", [0, 1])
def test_drop_equals_mask_everywhere(family: Family, backend: str, block: int) -> None:
    compare(family, backend, staged(block))


def compare(family: Family, backend: str, plan: Plan) -> Any:
    family = tower.deep(family)
    model = tower.build(family, backend)
    return tower.check_drop_equals_mask(family, model, prompts(family, model), plan, backend)


def test_only_kept_patches_are_embedded(family: Family) -> None:
    """Towers that embed every patch by itself embed those that the stage before block 0 keeps."""
    model = family.build()
    embed = getattr(tower.tower_of(model), "patch_embed", None)
    if embed is None:
        pytest.skip("this tower embeds whole pictures")
    inputs, sizes = prompt(family), []

    def count(module: Any, args: Any) -> None:
        sizes.append(len(args[0]))

    with torch.no_grad(), embed.proj.register_forward_pre_hook(count):
        model(**inputs)
        with tokencomp.patch(model, plan=Plan((), TowerStage(0, 0.5, RANDOM))) as handle:
            model(**inputs)
            spans = [span for row in handle.stats.spans for span in row]
            left = [kept for b in range(2) for kept in handle.stats.tower_kept(b)]
    kept = sum(len(set(k) - set(span.text)) for k, span in zip(left, spans, strict=True))
    half = len(sizes) // 2
    patches = tower.tower_of(model).spatial_merge_size ** 2
    assert sum(sizes[half:]) == kept * patches < 0.7 * sum(sizes[:half])


@dataclasses.dataclass(frozen=True)
class Loudest(ScoreReducer):
    """Keeps the cells of the largest hidden states."""

    name = "loudest"

    def scores(self, tokens: tokencomp.Tokens) -> Tensor:
        return tokens.features.norm(dim=1)


@pytest.mark.parametrize("block", [0, 1])
def test_cells_of_a_tower_that_sorts_them_by_window(block: int) -> None:
    """Qwen2.5-VL: 3 × 5 cells in windows of 2 × 2, an order that is not its own inverse."""
    family, loud = FAMILIES["qwen2_5_vl"], [1, 7, 13]
    model, image = tower.build(family), family.image(2)
    for attn in attention_blocks(tower.tower_of(model)):
        torch.nn.init.zeros_(attn.proj.weight)  # so that no patch reads another one
    image.inputs["pixel_values"].mul_(0.01)
    for cell in loud:
        image.inputs["pixel_values"][4 * cell : 4 * cell + 4] *= 1000
    inputs = tower.like(model, family.batch([[text(3), image, text(4)]]))
    plan = Plan((), TowerStage(block, 0.2, Loudest()))
    with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
        model(**inputs)
        assert handle.stats.tower_kept(0) == [loud]
        with tower.block_inputs(model, 1) as seen:
            model(**inputs)
    assert block or float(seen[0].norm(dim=-1).min()) > 5


def qwen35(family: Family, model: Any) -> dict[str, Tensor]:
    """A ragged batch: an image and a video with timestamps, and another such video."""
    if not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip("this release has no Qwen3.5")
    rows = [
        [text(3), family.image(0), text(2), family.video(4), text(5)],
        [family.video(4), text(6, 2)],
    ]
    return tower.like(model, family.batch(rows))


def test_embeddings_of_qwen35() -> None:
    """The input of the decoder, in float64."""
    family = tower.deep(Qwen35())
    model, plan = tower.build(family), Plan((), TowerStage(0, 0.6, RANDOM))
    inputs = qwen35(family, model)
    embeds: list[Tensor] = []

    def spy(module: Any, args: Any, kwargs: Any) -> None:
        embeds.append(kwargs["inputs_embeds"].clone())

    def embed() -> Tensor:
        handle = family.decoder(model).register_forward_pre_hook(spy, with_kwargs=True)
        with torch.no_grad():
            model(**inputs, use_cache=False)
        handle.remove()
        return embeds.pop()

    seen = tower.rows_after(model, inputs, plan)
    embeds.clear()
    with tokencomp.patch(model, plan=plan) as handle:
        left = embed()
        (kept,) = oracle.kept_columns(handle, inputs, 1)
    with tower.tower_masks(model, seen, 0):
        expected = embed()
    unmasked = embed()
    for b, columns in enumerate(kept):
        own = left[b, -int(columns.sum()) :]
        assert int(columns.sum()) < int(inputs["attention_mask"][b].sum())
        assert (own - expected[b, columns]).abs().max() < 1e-6
        assert (unmasked[b, columns] - expected[b, columns]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["dense", "dense budget", pytest.param("moe", marks=pytest.mark.long)]
)
def test_prefill_and_decode_of_qwen35(name: str) -> None:
    """Through `generate`; dropped tokens are hidden in full layers and absent in linear ones."""
    family = tower.deep(Qwen35Moe() if name == "moe" else Qwen35())
    model = tower.build(family, "eager")
    plan = budgeted(family, 5, "kcenter") if "budget" in name else whole(family)
    inputs = qwen35(family, model)
    seen = tower.rows_after(model, inputs, plan)
    with tokencomp.patch(model, plan=plan) as handle:
        out = oracle.generate(model, inputs, 4)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        spans = [(s.modality, s.grid, len(s.text)) for row in handle.stats.spans for s in row]
        with torch.no_grad():
            forward = model(**inputs).logits[:, -1]
    video = ("video", (2, 2, 4), 5)
    assert spans == [("image", (1, 4, 4), 0), video, video]
    length = inputs["input_ids"].shape[1]
    with tower.tower_masks(model, seen, 0):
        expected = oracle.masked_logits(model, family, inputs, masks, out.sequences[:, length:-1])
    logits = torch.stack(out.logits, 1)
    assert (logits - expected[:, length - 1 :]).abs().max() < tower.TOLERANCE["eager"]
    assert (forward - expected[:, length - 1]).abs().max() < tower.TOLERANCE["eager"]


def whole(family: Family) -> Plan:
    """Cells before block 0, then an entry stage."""
    return Plan((Stage(0, 0.4, RANDOM),), TowerStage(0, 0.6, make_reducer("kcenter")))


def test_batch_equals_singles_with_beams(family: Family) -> None:
    model = family.build()
    rows = [[text(3), family.image(0), text(5, 3)], [family.video(4), text(6, 4)], [text(5)]]
    options = dict(num_beams=2, num_return_sequences=2)
    with tokencomp.patch(model, plan=whole(family)) as handle:
        batch = oracle.generate(model, family.batch(rows), **options)
        kept = [handle.stats.tower_kept(2 * b) for b in range(2)]
        for b, row in enumerate(rows):
            single = oracle.generate(model, family.batch([row]), **options)
            assert torch.equal(batch.sequences[2 * b : 2 * b + 2, -8:], single.sequences[:, -8:])
            if b < 2:
                assert handle.stats.tower_kept(0) == kept[b]


def test_padding_holds_no_features_of_dropped_cells() -> None:
    """The longer prompt begins with an image whose first cell is dropped, and becomes shorter."""
    family = FAMILIES["qwen3_vl"]
    model, image = family.build(), family.image(0)
    image = dataclasses.replace(image, ids=image.ids[1:])  # without the token that begins it
    rows = [[image, text(3)], [text(3), family.image(1), text(4)]]
    cells = TowerStage(0, 0.5, make_reducer("random", seed=3))
    plan = Plan((Stage(0, 0.3, make_reducer("uniform")),), cells)
    with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
        together = model(**family.batch(rows), logits_to_keep=1).logits
        assert 0 not in handle.stats.tower_kept(0)[0]
        alone = [model(**family.batch([row]), logits_to_keep=1).logits for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_second_turns_on_a_reused_cache(family: Family) -> None:
    """A turn that brings its own image reads it behind a compressed cache, as in one prompt."""
    assert oracle.image_in_second_turn(family, family.build(), plan=whole(family)) < 1e-5


def test_the_question_counts_with_signals_of_the_tower(family: Family) -> None:
    """Reducers that read the tower's attention or keys get those of the cells that are left."""
    model, inputs = tower.build(tower.deep(family)), prompts(family, family.build().double())
    for reducer, options in (
        (plans.TowerTop(), {}),
        ("visionzip", {}),
    ):
        spec = dict(reducer=reducer, tower_ratio=0.4, tower_reducer="random", **options)
        with tokencomp.patch(model, 0.7, **spec) as handle, torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
            for b in range(2):
                pairs = zip(handle.stats.kept(b)[0], handle.stats.tower_kept(b), strict=True)
                assert all(set(kept) <= set(there) for kept, there in pairs)
