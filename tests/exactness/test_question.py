"""Reducers that look at the question see the question alone, in whatever call it stands.

The next token is predicted from the last column, so that column never leaves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import CORE, IMAGE, VIDEO, Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp import Plan, Stage

FAMILY_NAMES = CORE
RELEVANT = pytest.param(plans.RELEVANT, id="condiv")
REDUCERS = [RELEVANT, "cdpruner", "fastv", "prune", "aim"]


def kept(handle: tokencomp.Handle, rows: int) -> list:
    return [handle.stats.kept(b) for b in range(rows)]


def question(family: Family) -> dict[str, Tensor]:
    return family.batch([[text(3), family.image(0), text(9, 3)], [family.image(1), text(5, 4)]])


def with_answers(inputs: dict[str, Tensor], answers: Tensor, family: Family) -> dict[str, Tensor]:
    """A batch with a trained answer after every question."""
    ids = torch.cat([inputs["input_ids"], answers], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -answers.shape[1] :] = answers
    return {**family.finish({**inputs, "input_ids": ids, "attention_mask": mask}), "labels": labels}


@pytest.mark.thin(3)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_the_answer_does_not_choose(family: Family, reducer: Any) -> None:
    """With labels the same tokens stay as for the question alone, whatever the answer."""
    model, prompt = family.build(), question(family)
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        model(**prompt, use_cache=False)
        expected = kept(handle, 2)
        for seed in range(4):
            answers = torch.tensor([text(6, 20 + seed), text(6, 40 + seed)])
            inputs = with_answers(prompt, answers, family)
            inputs["labels"][0, -6:-4] = -100  # the answer of the first sample is shorter
            model(**inputs, use_cache=False)
            assert kept(handle, 2)[1] == expected[1]


class Wrapper(nn.Module):
    """A model that calls another one, as a trainer's wrapper does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, labels: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return self.inner(ids, **rest, labels=labels).loss


def test_the_last_turn_asks(family: Family) -> None:
    """Of several trained answers the question before the last counts, however labels come."""
    model = family.build()
    history = family.batch([[family.image(0), text(5, 1), text(4, 2), text(6, 3)]])
    inputs = with_answers(history, torch.tensor([text(5, 4)]), family)
    inputs["labels"][:, -15:-11] = inputs["input_ids"][:, -15:-11]  # the answer of the first turn
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=plans.RELEVANT) as handle:
        model(**history, use_cache=False)
        expected = kept(handle, 1)
        model(**inputs, use_cache=False)
        assert kept(handle, 1) == expected
        ids, labels = inputs.pop("input_ids"), inputs.pop("labels")
        Wrapper(model)(ids, labels, inputs)
        assert kept(handle, 1) == expected


@pytest.mark.thin(3)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_generating_without_a_cache(family: Family, reducer: Any) -> None:
    """Every step sees the tokens generated so far; they are no question."""
    model, inputs = family.build(), question(family)
    steps: list[list] = []
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        cached = oracle.generate(model, inputs, 6)
        expected = kept(handle, 2)
        model.register_forward_hook(lambda *_: steps.append(kept(handle, 2)))
        plain = oracle.generate(model, inputs, 6, use_cache=False)
    assert len(steps) == 6 and all(step == expected for step in steps)
    assert torch.equal(cached.sequences, plain.sequences)


# -- prompts that end in media ---------------------------------------------------------------------


def ends_in_media(family: Family, model: Any, words: int = 0) -> dict[str, Tensor]:
    """Prompts that end in a visual token, one of them without any text before it.

    The other one ends in text of `words` tokens, if not 0.
    """
    after = [text(words)] if words else []
    inputs = family.batch([[text(4), family.image(0), *after], [family.image(1)]])
    while int(inputs["input_ids"][1, -1]) not in (IMAGE, VIDEO):  # an end token after the image
        inputs = {
            k: v[:, :-1] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v
            for k, v in inputs.items()
        }
    return {**inputs, "position_ids": family.positions(model, inputs)}


def test_logits_of_media_are_no_drafts(family: Family) -> None:
    """The last three columns of one prompt of the batch are visual, so the other has no drafts."""
    model = family.build()
    inputs, found = ends_in_media(family, model, words=8), []
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer="fastv") as handle:
        for count in (0, 3):
            model(**inputs, logits_to_keep=count)
            found.append(kept(handle, 2))
    assert found[0] == found[1]


# Entry and layer stages, with and without scores, and a stage at which all but the last leaves.
ENDINGS: dict[str, dict[str, Any]] = {
    **{name: {"ratio": 0.6, "reducer": name} for name in ("aim", "prune", "divprune", "bipartite")},
    **{name: {"ratio": 0.6, "reducer": name} for name in ("random", "uniform", "fastv")},
    "condiv": {"ratio": 0.6, "reducer": plans.RELEVANT},
    "vanish": {"plan": plans.make("vanish", 4)},
}


@pytest.mark.parametrize("name", ENDINGS)
def test_prompts_that_end_in_media(family: Family, name: str) -> None:
    """The last logits are those of the masked run, and as many tokens stay as elsewhere."""
    model = family.build()
    inputs = ends_in_media(family, model)
    longer = family.batch([[text(4), family.image(0), text(3)], [family.image(1), text(3)]])
    with torch.no_grad(), tokencomp.patch(model, **ENDINGS[name]) as handle:
        got = model(**inputs, use_cache=False).logits[:, -1]
        stats, masks = handle.stats, oracle.kept_columns(handle, inputs, family.layers)
        merges = any(s.reducer.traits.merges for s in handle.plan.stages)
        model(**longer, use_cache=False)
    assert all(bool(mask[:, -1].all()) for mask in masks)
    elsewhere = [[max(n, 1) for n in row] for row in handle.stats.tokens_after]
    assert stats.tokens_after == elsewhere
    if not merges:
        full = oracle.masked_logits(model, family, inputs, masks)[:, -1]
        torch.testing.assert_close(got, full, atol=1e-4, rtol=1e-4)


def test_the_last_kept_patch_makes_room(family: Family) -> None:
    """Not a special token, and not another patch."""
    model = family.build()
    inputs, longer = ends_in_media(family, model), question(family)
    plan = Plan((Stage(0, 0.5, plans.Ragged()),))  # keeps leading patches
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        model(**longer, use_cache=False)
        elsewhere = [handle.stats.kept(b)[0][-1] for b in range(2)]
        model(**inputs, use_cache=False)
        for b, before in enumerate(elsewhere):
            span = handle.stats.spans[b][-1]
            fixed = {*span.special, *span.text}
            patches = [o for o in before if o not in fixed]
            expected = {*before, span.length - 1} - {patches[-1]}
            if span.length - 1 in before:  # it is a special token
                expected = {*before}
            assert {*handle.stats.kept(b)[0][-1]} == expected


@pytest.mark.parametrize("reducer", [RELEVANT, "uniform", "prune"])
def test_a_caption_right_behind_the_image(family: Family, reducer: Any) -> None:
    """Training on a caption keeps what the image alone would keep."""
    model = family.build()
    inputs = ends_in_media(family, model)
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        model(**inputs, use_cache=False)
        expected = kept(handle, 2)
        where = inputs.pop("position_ids")
        more = with_answers(inputs, torch.tensor([text(5, 20), text(5, 21)]), family)
        positions = torch.cat([where, where[..., -1:] + torch.arange(1, 6)], -1)
        real = more["attention_mask"].bool()
        everything = more["input_ids"].masked_fill(~real, -100)  # of the image as well
        for labels in (more["labels"], everything):
            model(**{**more, "labels": labels}, position_ids=positions, use_cache=False)
            assert kept(handle, 2) == expected
