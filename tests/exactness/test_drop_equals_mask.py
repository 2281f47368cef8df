"""Dropping tokens gives the logits of the full-length run that masks them."""

from __future__ import annotations

import oracle
import plans
import pytest
import torch
from tests_support import Family, text

import tokencomp


def prompts(family: Family) -> dict[str, torch.Tensor]:
    """Ragged: several images, image + video, text only."""
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)],
            [family.video(4), text(3, 4), family.image(2), text(4, 5)],
            [text(12, 6)],
        ]
    )


@pytest.mark.parametrize("name", plans.NAMES)
def test_prefill_and_decode(family: Family, backend: str, name: str) -> None:
    model, inputs = family.build(backend), prompts(family)
    plan = plans.make(name, family.layers)
    with tokencomp.patch(model, plan=plan) as handle:
        out = oracle.generate(model, inputs)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:]
    expected = oracle.masked_logits(model, family, inputs, masks, new[:, :-1])
    for step, logits in enumerate(out.logits):
        assert (logits - expected[:, length - 1 + step]).abs().max() < 1e-5, f"step {step}"
    assert sum(int(m.sum()) for m in masks) < family.layers * int(inputs["attention_mask"].sum())


@pytest.mark.parametrize("name", plans.NAMES)
def test_full_length_logits(family: Family, name: str) -> None:
    """Without logits_to_keep the output has every column, right wherever a token is left."""
    model, inputs = family.build(), prompts(family)
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
    expected = oracle.masked_logits(model, family, inputs, masks)
    assert logits.shape == expected.shape
    left = masks[-1]
    assert (logits - expected)[left].abs().max() < 1e-5
    assert logits[~left].abs().max() == 0


def test_labels(family: Family) -> None:
    """The loss is that of the masked run."""
    model, inputs = family.build(), prompts(family)
    visual = (inputs["input_ids"] == 150) | (inputs["input_ids"] == 151)
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    with tokencomp.patch(model, plan=plans.make("both", family.layers)) as handle, torch.no_grad():
        loss = model(**inputs, labels=labels).loss
        masks = oracle.kept_columns(handle, inputs, family.layers)
    logits = oracle.masked_logits(model, family, inputs, masks)
    # positions whose own token was dropped predict nothing in the compressed run
    targets, scores = labels[:, 1:], logits[:, :-1].clone()
    scores[~masks[-1][:, :-1]] = 0
    expected = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_merged_features(family: Family) -> None:
    """A merging reducer equals the masked run whose kept embeddings were replaced."""
    model, inputs = family.build(), prompts(family)
    with tokencomp.patch(model, 0.6, reducer="merge") as handle:
        out = oracle.generate(model, inputs)
        masks, stats = oracle.kept_columns(handle, inputs, family.layers), handle.stats
        spans, kept = stats.spans, [stats.kept(b)[0] for b in range(3)]
    length, reducer = inputs["input_ids"].shape[1], tokencomp.make_reducer("merge")

    def replace(module, args, kwargs):
        x = kwargs["inputs_embeds"].clone()
        for b, row in enumerate(spans):
            for span, offsets in zip(row, kept[b], strict=True):
                tokens = tokencomp.VisualTokens(
                    x[b, span.start : span.stop].clone(), span.grid, span.special_mask()
                )
                columns = [span.start + o for o in offsets]
                x[b, columns] = reducer.reduce(tokens, len(offsets)).merged
        return args, {**kwargs, "inputs_embeds": x}

    hook = family.decoder(model).register_forward_pre_hook(replace, with_kwargs=True)
    new = out.sequences[:, length:]
    expected = oracle.masked_logits(model, family, inputs, masks, new[:, :-1])
    hook.remove()
    for step, logits in enumerate(out.logits):
        assert (logits - expected[:, length - 1 + step]).abs().max() < 1e-5
