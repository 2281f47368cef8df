"""The next token is predicted from the last column, so that column never leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import CORE, Family, text

import tokencomp
from tokencomp import Plan, Reduction, Stage, VisualTokens, make_reducer
from tokencomp.engine.choose import keep_last

FAMILY_NAMES = (*CORE, "llava")
REDUCERS = [
    "aim",
    "prune",
    pytest.param(plans.RELEVANT, id="condiv"),
    "divprune",
    "bipartite",
    "random",
    "uniform",
    "fastv",
]


def ends_in_media(family: Family) -> dict[str, torch.Tensor]:
    """Prompts that end in a visual token, one of them without any text before it."""
    inputs = family.batch([[text(4), family.image(0)], [family.image(1)]])
    ids = inputs["input_ids"]
    while int(ids[0, -1]) not in (150, 151):  # an end token behind the image
        inputs = {
            k: v[:, :-1] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v
            for k, v in inputs.items()
        }
        ids = inputs["input_ids"]
    return inputs


@pytest.mark.parametrize("reducer", REDUCERS)
def test_prompts_that_end_in_media(family: Family, reducer: Any) -> None:
    """The last logits are those of the masked run, which hides the dropped columns."""
    model, inputs = family.build(), ends_in_media(family)
    where = family.positions(model, inputs)
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        got = model(**inputs, position_ids=where, use_cache=False).logits[:, -1]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        merges = any(s.reducer.merges for s in handle.plan.stages)
        counts = [[s.kept(b) for b in range(2)] for s in (handle.stats,)]
    assert all(bool(mask[:, -1].all()) for mask in masks) and counts
    if not merges:
        full = oracle.masked_logits(model, family, inputs, masks)[:, -1]
        torch.testing.assert_close(got, full, atol=1e-4, rtol=1e-4)


def test_a_whole_span_leaves_but_for_its_last_token(family: Family) -> None:
    model, inputs = family.build(), ends_in_media(family)
    where = family.positions(model, inputs)
    uniform = make_reducer("uniform")
    plan = Plan((Stage(0, 0.5, uniform), Stage(3, 0.0, uniform)))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        got = model(**inputs, position_ids=where, use_cache=False).logits[:, -1]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        left = [[len(span) for span in handle.stats.kept(b)[1]] for b in range(2)]
        seen = [row[-1] for row in handle.stats.tokens_after]
    assert [row[-1] for row in left] == [1, 1] and seen == [1, 1]
    full = oracle.masked_logits(model, family, inputs, masks)[:, -1]
    torch.testing.assert_close(got, full, atol=1e-4, rtol=1e-4)


def test_the_count_stays_exact(family: Family) -> None:
    """The last token takes the place of another; the budget is the same."""
    model, inputs = family.build(), ends_in_media(family)
    longer = family.batch([[text(4), family.image(0), text(3)], [family.image(1), text(3)]])
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make("entry", 4)) as handle:
        model(**inputs, use_cache=False)
        ends = handle.stats.tokens_after
        model(**longer, use_cache=False)
        assert ends == handle.stats.tokens_after


def test_the_last_kept_patch_makes_room() -> None:
    """Not a special token, and not another patch; the last token keeps its size."""
    special = torch.tensor([False, False, True, False, False])
    sizes = torch.tensor([2.0, 3.0, 1.0, 4.0, 5.0])
    tokens = VisualTokens(torch.arange(10.0).view(5, 2), (1, 2, 2), special, sizes=sizes)
    before = Reduction(torch.tensor([0, 1, 2]), torch.zeros(3, 2), torch.tensor([6.0, 3.0, 1.0]))
    after = keep_last(before, tokens)
    assert after.keep.tolist() == [0, 2, 4] and after.sizes.tolist() == [6.0, 1.0, 5.0]
    assert after.merged.tolist() == [[0.0, 0.0], [0.0, 0.0], [8.0, 9.0]]


@pytest.mark.parametrize("reducer", [pytest.param(plans.RELEVANT, id="condiv"), "uniform", "prune"])
def test_a_caption_right_behind_the_image(family: Family, reducer: Any) -> None:
    """Training on a caption keeps what the image alone would keep."""
    model, inputs = family.build(), ends_in_media(family)
    where = family.positions(model, inputs)
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        model(**inputs, position_ids=where, use_cache=False)
        expected = [handle.stats.kept(b) for b in range(2)]
        answers = torch.tensor([text(5, 20), text(5, 21)])
        ids = torch.cat([inputs["input_ids"], answers], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
        more = family.finish({**inputs, "input_ids": ids, "attention_mask": mask})
        labels = torch.full_like(ids, -100)
        labels[:, -5:] = answers
        steps = where[..., -1:] + torch.arange(1, 6)
        model(**more, position_ids=torch.cat([where, steps], -1), labels=labels, use_cache=False)
        assert [handle.stats.kept(b) for b in range(2)] == expected
