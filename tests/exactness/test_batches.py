"""Batches with padding on the right or with hidden text, and several prompts in one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import backends, oracle, plans
from support.backends import FLASH
from support.families import CORE, FAMILIES, PAD, Family, text
from support.prompts import pack, packed_rows, right_padded

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import PaddingError

FAMILY_NAMES = CORE


def left_padded(family: Family, model: Any) -> dict[str, torch.Tensor]:
    """A batch with its positions."""
    inputs = family.batch(
        [
            [text(3), family.image(0), text(9, 3)],
            [family.image(1), text(3, 4), family.image(2), text(5, 5)],
            [text(7, 6)],
        ]
    )
    return {**inputs, "position_ids": family.positions(model, inputs)}


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.NAMES)
def test_padding_on_the_right(family: Family, name: str) -> None:
    """The logits of the left-padded batch, and of words that follow on its cache."""
    model = family.build()
    left = left_padded(family, model)
    right, order = right_padded(family, model, left)
    new, found = torch.tensor([text(3, 8 + b) for b in range(3)]), []
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        for inputs in (left, right):
            out = model(**inputs, use_cache=True)
            kept = [handle.stats.kept(b) for b in range(3)]
            masks = oracle.kept_columns(handle, inputs, family.layers)
            turn = oracle.later_turn(inputs, inputs["position_ids"], new, out)
            found.append((kept, out.logits, model(**turn, use_cache=True).logits))
    (kept, logits, later), (moved_kept, moved, moved_later) = found
    assert moved_kept == kept
    real = right["attention_mask"].bool()
    spread = logits.gather(1, order[..., None].expand_as(logits))
    torch.testing.assert_close(moved[real], spread[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved_later, later, atol=1e-4, rtol=1e-4)
    assert all(bool((m <= real).all()) for m in masks)  # spans are in columns of the caller


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "reducer", [pytest.param(plans.RELEVANT, id="condiv"), "bipartite", "fastv"]
)
def test_a_training_step_with_padding_on_the_right(family: Family, reducer: Any) -> None:
    """Collators for training pad so: the same loss and gradients."""
    model = family.build().train()
    left = left_padded(family, model)
    right, order = right_padded(family, model, left)
    labels = torch.full_like(left["input_ids"], -100)
    labels[:, -4:] = left["input_ids"][:, -4:]
    found = []
    with tokencomp.patch(model, 0.5, reducer=reducer):
        for call in ({**left, "labels": labels}, {**right, "labels": labels.gather(1, order)}):
            model.zero_grad(set_to_none=True)
            loss = model(**call).loss
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append({**grads, "loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_hidden_text(family: Family) -> None:
    """A mask with holes in the text: what it hides is left out, which equals masking it."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    where = family.positions(model, inputs)
    inputs["attention_mask"][0, [1, -4, -3]] = 0
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("entry", 4)) as handle:
        got = model(**inputs, position_ids=where, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
    seen = masks[-1]
    with torch.no_grad(), oracle.masked(model, family, masks):
        full = model(**inputs, position_ids=where, use_cache=False).logits
    torch.testing.assert_close(got[seen], full[seen], atol=1e-4, rtol=1e-4)


def test_what_a_mask_must_not_hide(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)], [text(4)]])
    where = family.positions(model, inputs)
    visual = int((inputs["input_ids"][0] == 150).nonzero()[2])
    part, sample = (inputs["attention_mask"].clone() for _ in range(2))
    part[0, visual], sample[1] = 0, PAD
    with tokencomp.patch(model, 0.5):
        for mask, match in (
            (part, r"hides 1 of the \d+ tokens of the image"),
            (sample, "sample 1: attention_mask hides all"),
        ):
            with pytest.raises(PaddingError, match=match):
                model(**{**inputs, "attention_mask": mask}, position_ids=where)
        model(**inputs, position_ids=where)  # the model still works


# -- several prompts in one row --------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "condiv": {"ratio": 0.5, "reducer": plans.RELEVANT},
    "cdpruner": {"ratio": 0.5, "reducer": "cdpruner"},
    "merged": {"ratio": 0.5, "reducer": "kcenter", "merge": True},
    "compact": {"ratio": 0.5, "reducer": "uniform", "positions": "compact"},
    "prune": {},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", SETTINGS)
def test_packed_equals_alone(family: Family, name: str, backend: str) -> None:
    """Each prompt is compressed, and answered, as if it were alone."""
    if name == "compact" and family.mrope:
        pytest.skip("positions of three axes are never compact")
    model, rows, setting = family.build(backend), packed_rows(family), SETTINGS[name]
    if name == "prune":
        layer = max(2, adapter_for(model).first_layer_stage)
        setting = {"plan": Plan((Stage(layer, 0.5, make_reducer("prune")),))}
    with torch.no_grad(), tokencomp.patch(model, **setting) as handle:
        packed = model(**pack(family, model, rows), use_cache=False).logits[0]
        kept = [span for stage in handle.stats.kept(0) for span in stage]
        alone, expected = [], []
        for row in rows:
            inputs = family.batch([row])
            positions = family.positions(model, inputs)
            alone.append(model(**inputs, position_ids=positions, use_cache=False).logits[0])
            if handle.stats:
                expected += [span for stage in handle.stats.kept(0) for span in stage]
    assert kept == expected
    logits = torch.cat(alone)
    shown = logits.any(-1)  # dropped tokens that begin a prompt alone have no row before them
    assert shown.float().mean() > 0.9
    torch.testing.assert_close(packed[shown], logits[shown], atol=1e-4, rtol=1e-4)


def test_frames_of_another_prompt_are_not_compared(family: Family) -> None:
    """`timechat` chooses in each of two prompts with equal pictures as in it alone."""
    model, picture = family.build(), family.image(1)
    rows = [[text(3), picture, text(4)], [text(2, 5), picture, text(3, 6)]]
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="timechat") as handle:
        model(**pack(family, model, rows), use_cache=False)
        packed, alone = handle.stats.kept(0)[0], []
        for row in rows:
            inputs = family.batch([row])
            model(**inputs, position_ids=family.positions(model, inputs), use_cache=False)
            alone += handle.stats.kept(0)[0]
        both = family.batch([[*rows[0], *rows[1]]])
        model(**both, position_ids=family.positions(model, both), use_cache=False)
        assert handle.stats.kept(0)[0] != alone  # one prompt compares them
    assert packed == alone


def test_packed_equals_masked(family: Family) -> None:
    """Against the full-length, unpatched run whose dropped columns are hidden by a mask."""
    model, rows, start = family.build(), packed_rows(family), 0
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("both", family.layers)) as handle:
        inputs = pack(family, model, rows)
        packed = model(**inputs, use_cache=False).logits[0]
        ones = {"attention_mask": torch.ones_like(inputs["input_ids"])}
        masks = oracle.kept_columns(handle, ones, family.layers)
        assert handle.stats.ratio > 0.3
    for row in rows:
        part = family.batch([row])
        stop = start + part["input_ids"].shape[1]
        own = [mask[:, start:stop] for mask in masks]
        full = oracle.masked_logits(model, family, part, own)[0]
        left = own[-1][0]
        torch.testing.assert_close(packed[start:stop][left], full[left], atol=1e-4, rtol=0)
        start = stop


def test_a_mask_says_that_prompts_are_not_packed(family: Family) -> None:
    """As in transformers: positions that start again are then those of one prompt."""
    model = family.build()
    inputs = pack(family, model, packed_rows(family))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("both", family.layers)) as handle:
        found = model(**inputs, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
    with torch.no_grad(), oracle.masked(model, family, masks):
        full = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found[masks[-1]], full[masks[-1]], atol=1e-4, rtol=0)


def test_flops_count_every_prompt_alone(family: Family) -> None:
    model, rows = family.build(), packed_rows(family)
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model(**pack(family, model, rows), use_cache=False)
        packed = handle.stats
        before = after = 0
        for row in rows[:2]:
            model(**family.batch([row]), use_cache=False)
            before += handle.stats.flops_before
            after += handle.stats.flops_after
        last = packed.layers[0].flops(len(rows[2][0])) * family.layers
    assert packed.flops_before == before + last
    assert packed.flops_after == after + last


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_lengths_that_flash_attention_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cu_seq_lens_*`, where they are given, count the rows that are left in every layer.

    They run on from one packed sample to the next.
    """
    backends.install(monkeypatch, FLASH)
    family = FAMILIES[name]
    model, rows = backends.build(family, FLASH), packed_rows(family)
    samples = [rows, rows[::-1]]
    inputs = family.batch([[item for row in sample for item in row] for sample in samples])
    del inputs["attention_mask"]
    positions = [pack(family, model, sample)["position_ids"] for sample in samples]
    inputs["position_ids"] = torch.cat(positions, -2)
    prompts = [family.batch([row])["input_ids"].shape[1] for sample in samples for row in sample]
    lengths = torch.tensor([0, *prompts])
    bounds, longest = lengths.cumsum(0).int(), int(lengths.max())
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    given |= {"max_length_q": longest, "max_length_k": longest}
    try:
        model(**inputs, **given, use_cache=False)
    except TypeError:
        pytest.skip("the release hands the lengths of prompts to the tower of this model")
    found = []
    for own, extra in ((model, given), (family.build(), {})):
        with tokencomp.patch(own, plan=plans.make("both", family.layers)), torch.no_grad():
            found.append(own(**inputs, **extra, use_cache=False).logits)
    assert oracle.difference(*found) < 2e-5
