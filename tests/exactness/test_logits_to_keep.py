"""`logits_to_keep`: as many logits as without a patch, and of the same columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import kinds, oracle
from support.families import Family, text
from support.family.hybrid import HYBRID

import tokencomp
from tokencomp import Plan, Stage, make_reducer

FAMILY_NAMES = ["llava_onevision", *sorted(HYBRID)]
UNIFORM = make_reducer("uniform")
TAIL = 6  # columns of text behind the last image


def ragged(family: Family) -> dict[str, torch.Tensor]:
    """A left-padded batch of two images, one image, and text alone."""
    first = [text(3), family.image(0), text(2, 2), family.image(1), text(TAIL + 2, 3)]
    return family.batch([first, [text(4, 4), family.image(1), text(TAIL, 5)], [text(9, 6)]])


def plan_of(family: Family, layered: bool) -> Plan:
    late = {"gemma4_e": 1, "gemma4": 4}.get(family.name, 2)
    later = (Stage(late, 0.25, UNIFORM),) if layered else ()
    return Plan((Stage(0, 0.5, UNIFORM), *later))


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_columns_are_those_of_the_masked_run(family: Family, single: bool, layered: bool) -> None:
    model, inputs = family.build(), ragged(family)
    if single:
        inputs = family.batch([[text(3), family.image(0), text(TAIL, 3)]])
    width = inputs["input_ids"].shape[1]
    counts: list[Any] = [0, 1, 2, TAIL - 1, TAIL, TAIL + 1, TAIL + 3, width]
    counts += [torch.tensor([width - 1]), torch.tensor([width - 2, 0, width - TAIL - 2])]
    with torch.no_grad():
        plain = [model(**inputs, logits_to_keep=k).logits.shape for k in counts]
        with tokencomp.patch(model, plan=plan_of(family, layered)) as handle:
            found = [model(**inputs, logits_to_keep=k).logits for k in counts]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        none = inputs["input_ids"][:, :0]
        expected = kinds.expected_logits(model, family, inputs, masks, none)
    for k, logits, shape in zip(counts, found, plain, strict=True):
        assert logits.shape == shape
        columns = slice(-k, None) if isinstance(k, int) else k
        if shape[1] == width:  # the model ignores the argument (MiniCPM-V 4.6)
            columns = slice(None)
        left = masks[-1][:, columns]
        own = expected[:, columns][left]
        torch.testing.assert_close(logits[left], own, atol=5e-5, rtol=1e-5)


def test_generate_asks_for_one_column(family: Family) -> None:
    """As without a patch, the head of a language model has one row of every sample."""
    model, inputs, seen = family.build(), ragged(family), []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2])):
        oracle.generate(model, inputs, 2)
        with tokencomp.patch(model, 0.5, reducer="uniform"):
            oracle.generate(model, inputs, 2)
    assert seen[:2] == seen[2:] and seen[1] == (3, 1)


@pytest.mark.skipif("gemma4_e" not in HYBRID, reason="the release has no Gemma 4")
def test_a_body_whose_decoder_cuts_its_states() -> None:
    """Called on its own, it gives all columns, as it may without a patch."""
    family = HYBRID["gemma4_e"]
    model, inputs = family.build("eager"), ragged(family)
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform"):
        whole = model.model(**inputs).last_hidden_state
        found = model.model(**inputs, logits_to_keep=2).last_hidden_state
    torch.testing.assert_close(found, whole)
