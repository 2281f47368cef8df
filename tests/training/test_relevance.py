"""Relevance rows against the plain product of full matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import Family, text
from torch import Tensor, nn

from tokencomp import Plan, Stage, make_reducer, patch
from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.prompt import IGNORED
from tokencomp.errors import OptionError
from tokencomp.training.relevance import explain, relevance


def with_answers(family: Family, rows: list[list[Any]], answers: list[list[int]]) -> tuple:
    inputs = family.batch([[*row, answer] for row, answer in zip(rows, answers, strict=True)])
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for b, answer in enumerate(answers):
        labels[b, -len(answer) :] = torch.tensor(answer)
    return inputs, labels


def brute_force(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, target: str) -> Tensor:
    """Full matrices of all layers and one backward pass per answer token; one sample."""
    rows = []
    for at in (labels[0] != IGNORED).nonzero()[:, 0].tolist():
        out = model(**inputs, output_attentions=True, use_cache=False)
        weights = out.attentions
        logits = out.logits[0, at - 1]
        y = logits[labels[0, at]] - (logits.exp().sum().log() if target == "logprob" else 0.0)
        full = torch.eye(labels.shape[1])
        for a, g in zip(weights, torch.autograd.grad(y, weights), strict=True):
            full = full + (a * g)[0].clamp(min=0).mean(0) @ full
        rows.append(full[at - 1])
    return torch.stack(rows).mean(0)


@pytest.mark.thin(3)
@pytest.mark.parametrize(("answers", "target"), [(1, "logit"), (3, "logit"), (3, "logprob")])
def test_equals_the_product_of_full_matrices(family: Family, answers: int, target: Any) -> None:
    """Several spans, several answer tokens, and a left-padded batch against single samples."""
    model = family.build("eager")
    prompts = [[text(5), family.image(), text(4), family.image(1), text(6)],
               [family.video(), text(9)]]  # fmt: skip
    replies = [text(answers, seed=3), text(max(answers - 1, 1), seed=4)]
    inputs, labels = with_answers(family, prompts, replies)
    seen, got = explain(model, inputs, labels, target)
    for b, prompt in enumerate(prompts):
        alone, answered = with_answers(family, [prompt], [replies[b]])
        expected = brute_force(model, alone, answered, target)
        pad = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
        for span, scores in zip(seen.spans[b], got[b], strict=True):
            assert (scores >= 0).all() and scores.max() > 0
            near = expected[span.start - pad : span.stop - pad]
            torch.testing.assert_close(scores, near, atol=1e-5, rtol=1e-4)


def test_attention_backend_and_parameters_are_left_alone(family: Family) -> None:
    model = family.build("sdpa")
    inputs, labels = with_answers(family, [[family.image(), text(5)]], [text(2)])
    before = model(**inputs).logits
    sdpa = relevance(model, inputs, labels)[0][0]
    assert adapter_for(model).text_config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, model(**inputs).logits)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(sdpa, relevance(model, inputs, labels)[0][0])


def test_answers_must_exist_and_the_model_must_not_be_patched(family: Family) -> None:
    model = family.build()
    inputs, labels = with_answers(family, [[family.image(), text(5)]], [text(2)])
    with pytest.raises(OptionError, match="no answer tokens"):
        relevance(model, inputs, torch.full_like(labels, IGNORED))
    for layer, name in ((0, "uniform"), (family.layers - 1, "prune")):
        plan = Plan((Stage(layer, 0.5, make_reducer(name)),))
        with patch(model, plan=plan) as handle:
            with pytest.raises(OptionError, match="unpatch"):
                relevance(model, inputs, labels)
            with handle.disabled():
                assert relevance(model, inputs, labels)
