"""Dropping tokens gives the logits of the full-length run that masks them."""

from __future__ import annotations

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES, Family, text

import tokencomp

FAMILY_NAMES = sorted(FAMILIES)


def prompts(family: Family) -> dict[str, torch.Tensor]:
    """Ragged: several images, image + video, text only."""
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)],
            [family.video(4), text(3, 4), family.image(2), text(4, 5)],
            [text(12, 6)],
        ]
    )


@pytest.mark.thin(2)
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


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "internvl", "vila"])
def test_adjacent_videos(name: str) -> None:
    """Two clips without text between them are two spans, beside a prompt with one clip."""
    family = FAMILIES[name]
    rows = [
        [text(3), family.video(4), family.video(4), text(4, 5)],
        [text(2), family.video(4), text(9, 3)],
    ]
    model, inputs = family.build(), family.batch(rows)
    with tokencomp.patch(model, 0.6, reducer="kcenter") as handle, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
        assert handle.stats is not None
        lengths = [[span.length for span in row] for row in handle.stats.spans]
    assert len({*lengths[0], *lengths[1]}) == 1 and len(lengths[0]) == 2 * len(lengths[1])
    expected = oracle.masked_logits(model, family, inputs, masks)
    assert (logits - oracle.repeated(expected, masks[-1])).abs().max() < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", plans.NAMES)
def test_full_length_logits(family: Family, name: str) -> None:
    """Without logits_to_keep the output has every column; one that left repeats what it follows."""
    model, inputs = family.build(), prompts(family)
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
    expected = oracle.masked_logits(model, family, inputs, masks)
    assert logits.shape == expected.shape
    assert (logits - oracle.repeated(expected, masks[-1])).abs().max() < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["entry", "attention", "vanish"])
def test_hidden_states(family: Family, name: str) -> None:
    """They have every column too, each layer's own tokens, whatever `logits_to_keep` says."""
    model, inputs = family.build(), prompts(family)
    call = {"use_cache": False, "output_hidden_states": True}
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        states = model(**inputs, **call, logits_to_keep=1).hidden_states
        masks = oracle.kept_columns(handle, inputs, family.layers)
    with torch.no_grad(), oracle.layer_masks(model, family, masks):
        expected = model(**inputs, **call).hidden_states
    assert len(states) == len(expected) == family.layers + 1
    for layer, (mine, full) in enumerate(zip(states, expected, strict=True)):
        left = masks[max(layer - 1, 0)]
        assert (mine - oracle.repeated(full, left))[left].abs().max() < 1e-5, f"layer {layer}"
        assert mine.shape == full.shape


def test_labels(family: Family) -> None:
    """The loss is that of the masked run."""
    model, inputs = family.build(), prompts(family)
    visual = (inputs["input_ids"] == 150) | (inputs["input_ids"] == 151)
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    with tokencomp.patch(model, plan=plans.make("both", family.layers)) as handle, torch.no_grad():
        loss = model(**inputs, labels=labels).loss
        masks = oracle.kept_columns(handle, inputs, family.layers)
    logits = oracle.masked_logits(model, family, inputs, masks)
    # a label right behind dropped tokens is predicted from the last that is left before them
    targets, scores = labels[:, 1:], oracle.repeated(logits, masks[-1])[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_merged_features(family: Family) -> None:
    """A merging reducer equals the masked run whose kept embeddings were replaced."""
    model, inputs = family.build(), prompts(family)
    with tokencomp.patch(model, 0.6, reducer="bipartite") as handle:
        out = oracle.generate(model, inputs)
        masks, stats = oracle.kept_columns(handle, inputs, family.layers), handle.stats
        spans, kept = stats.spans, [stats.kept(b)[0] for b in range(3)]
    length, reducer = inputs["input_ids"].shape[1], tokencomp.make_reducer("bipartite")

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
