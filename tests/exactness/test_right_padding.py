"""Masks that are not left-padded: the logits, loss and gradients of the left-padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import CORE, PAD, Family, text
from support.padding import positions, shifted

import tokencomp
from tokencomp.errors import PaddingError

FAMILY_NAMES = CORE


def rows(family: Family) -> list[list[Any]]:
    return [
        [text(3), family.image(0), text(9, 3)],
        [family.image(1), text(3, 4), family.image(2), text(5, 5)],
        [text(7, 6)],
    ]


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.NAMES)
def test_right_equals_left(family: Family, name: str) -> None:
    model, left = family.build(), family.batch(rows(family))
    right, order = shifted(left)
    where = family.positions(model, left)
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        expected = model(**left, position_ids=where, use_cache=False).logits
        kept = [handle.stats.kept(b) for b in range(3)]
        moved = positions(family, model, left, order)
        got = model(**right, position_ids=moved, use_cache=False).logits
        assert [handle.stats.kept(b) for b in range(3)] == kept
        masks = oracle.kept_columns(handle, right, family.layers)
    real = right["attention_mask"].bool()
    spread = expected.gather(1, order[..., None].expand_as(expected))
    torch.testing.assert_close(got[real], spread[real], atol=1e-4, rtol=1e-4)
    assert all(bool((m <= real).all()) for m in masks)  # spans are in columns of the caller


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "reducer", [pytest.param(plans.RELEVANT, id="condiv"), "bipartite", "fastv"]
)
def test_a_training_step(family: Family, reducer: Any) -> None:
    """Collators for training pad on the right: the same loss and gradients."""
    model, left = family.build().train(), family.batch(rows(family))
    right, order = shifted(left)
    labels = torch.full_like(left["input_ids"], -100)
    labels[:, -4:] = left["input_ids"][:, -4:]
    where = family.positions(model, left)
    calls = (
        {**left, "position_ids": where, "labels": labels},
        {
            **right,
            "position_ids": positions(family, model, left, order),
            "labels": labels.gather(1, order),
        },
    )
    found = []
    with tokencomp.patch(model, 0.5, reducer=reducer):
        for call in calls:
            model.zero_grad(set_to_none=True)
            loss = model(**call).loss
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append({**grads, "loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_generation_goes_on(family: Family) -> None:
    """A right-padded prompt, then further tokens on its cache."""
    model, left = family.build(), family.batch(rows(family)[:2])
    right, order = shifted(left)
    new = torch.tensor([text(3, 8), text(3, 9)])
    logits = []
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("both", family.layers)):
        for inputs, where in (
            (left, family.positions(model, left)),
            (right, positions(family, model, left, order)),
        ):
            out = model(**inputs, position_ids=where, use_cache=True)
            last = where.amax(-1, keepdim=True) + torch.arange(1, 4)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
            more = {"input_ids": new, "attention_mask": mask, "position_ids": last}
            cache = oracle.cache_of(out)
            logits.append(model(**more, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_hidden_text(family: Family) -> None:
    """A mask with holes in the text: what it hides is left out, which equals masking it."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    inputs["attention_mask"][0, [1, -4, -3]] = 0
    where = family.positions(
        model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    )
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("entry", 4)) as handle:
        got = model(**inputs, position_ids=where, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
    seen = masks[-1]
    with torch.no_grad(), oracle.layer_masks(model, family, masks):
        full = model(**inputs, position_ids=where, use_cache=False).logits
    torch.testing.assert_close(got[seen], full[seen], atol=1e-4, rtol=1e-4)


def test_what_a_mask_must_not_hide(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)], [text(4)]])
    visual = int((inputs["input_ids"][0] == 150).nonzero()[2])
    broken = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    broken["attention_mask"][0, visual] = 0
    where = family.positions(model, inputs)
    with tokencomp.patch(model, 0.5):
        with pytest.raises(PaddingError, match=r"hides 1 of the \d+ tokens of the image"):
            model(**broken, position_ids=where)
        broken["attention_mask"] = inputs["attention_mask"].clone()
        broken["attention_mask"][1] = PAD
        with pytest.raises(PaddingError, match="sample 1: attention_mask hides all"):
            model(**broken, position_ids=where)
        model(**inputs, position_ids=where)  # the model still works
