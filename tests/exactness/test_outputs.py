"""What a call returns beside the last logits: attention maps, hidden states, `logits_to_keep`."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from support import oracle, plans
from support.caches import static_cache
from support.families import CORE, FAMILIES, Family, text
from support.family.hybrid import HYBRID
from support.prompts import single
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.run import compress, model_classes
from benchmarks.conformance.variants import variants
from tokencomp import Plan, Stage, make_reducer
from tokencomp.conformance.build import tiny_model
from tokencomp.conformance.oracle import columns_left, hidden
from tokencomp.conformance.prompts import Prompts

FAMILY_NAMES = CORE
UNIFORM = make_reducer("uniform")
TAIL = 6  # columns of text after the last image


@pytest.mark.parametrize("name", ["both", "attention"])
def test_maps_are_those_of_the_masked_run(family: Family, name: str) -> None:
    """Of full length: a dropped key has weight 0, and the query of a dropped token repeats."""
    model = family.build("eager")
    inputs = family.batch(
        [[text(3), family.image(0), text(9, 3)], [family.image(1), text(5, 4)], [text(6)]]
    )
    options = {"position_ids": family.positions(model, inputs), "output_attentions": True}
    options["use_cache"] = False
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        found = model(**inputs, **options).attentions
        masks = oracle.kept_columns(handle, inputs, family.layers)
    with torch.no_grad(), oracle.masked(model, family, masks):
        full = model(**inputs, **options).attentions
    check_maps(found, full, masks)
    queries = found[-1].transpose(1, 2).flatten(2)
    assert torch.equal(queries, oracle.repeated(queries, masks[-1]))


def check_maps(found: Any, full: Any, masks: list[Tensor]) -> None:
    """Maps of kept queries are those of the masked run, and 0 at the keys of dropped tokens."""
    for here, there, mask in zip(found, full, masks, strict=True):
        assert here.shape == there.shape
        for b, rows in enumerate(mask):
            torch.testing.assert_close(here[b][:, rows], there[b][:, rows], atol=1e-5, rtol=1e-4)
            assert bool((here[b][:, rows][..., ~rows] == 0).all())


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", [name for name in ("qwen3_5", "lfm2_vl") if name in HYBRID])
def test_maps_of_decoders_with_linear_layers(name: str, layer: int) -> None:
    """A stage before every layer: transformers gives a map for each layer that attends."""
    family = HYBRID[name]
    model = family.build("eager")
    rows = [[text(3), family.image(0), text(9, 3)], [family.image(1), text(5, 4)], [text(6)]]
    inputs = {**family.batch(rows), "output_attentions": True, "use_cache": False}
    plan = Plan((Stage(layer, 0.4, UNIFORM),))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        found = model(**inputs).attentions
        masks = oracle.kept_columns(handle, inputs, family.layers)
    with torch.no_grad(), oracle.masked(model, family, masks):
        full = model(**inputs).attentions
    types = model.config.get_text_config().layer_types
    check_maps(found, full, [m for m, t in zip(masks, types, strict=True) if "full" in t])


@pytest.mark.parametrize("merge", [False, True])
def test_maps_of_a_step_in_a_window(merge: Any) -> None:
    """Layers with a window have maps of what their cache holds without a patch."""
    family = HYBRID["gemma3"]
    model, inputs = family.build("eager"), family.batch([[text(3), family.image(0), text(4, 3)]])
    step = {"input_ids": torch.tensor([[7]]), "use_cache": True, "output_attentions": True}

    with torch.no_grad():
        plain = oracle.cache_of(model(**inputs, use_cache=True))
        shapes = [m.shape for m in model(**step, past_key_values=plain).attentions]
        with tokencomp.patch(model, 0.5, reducer="kcenter", merge=merge) as handle:
            cache = oracle.cache_of(model(**inputs, use_cache=True))
            found = model(**step, past_key_values=cache).attentions
            masks = oracle.kept_columns(handle, inputs, family.layers)
        # One run over the prompt and the token; a merged token has the weight of all its tokens.
        new = step["input_ids"]
        whole = oracle.continued(inputs, family.positions(model, inputs), new)
        merged = oracle.Merged(handle) if merge else None
        if merged is not None:
            merged.sizes = torch.ones(whole["input_ids"].shape)
        seen = [torch.cat([mask, torch.ones_like(new).bool()], 1) for mask in masks]
        with oracle.masked(model, family, seen, merged):
            full = model(**whole, use_cache=False, output_attentions=True).attentions
    for here, there, shape in zip(found, full, shapes, strict=True):
        assert here.shape == shape
        assert oracle.difference(here, there[..., -1:, -shape[-1] :]) < 1e-5
    assert merged is None or merged.sizes.max() > 1


@pytest.mark.parametrize("name", ["entry", "both"])
def test_maps_of_later_turns(family: Family, name: str) -> None:
    """A second prompt with an image, and single tokens after it, on a compressed cache."""
    model = family.build("eager")
    one, two = family.image(0), family.image(1)
    first = family.batch([[text(3), one, text(4, 3)]])
    whole = family.batch([[text(3), one, text(4, 3), two, text(5, 5)]])
    where, split = family.positions(model, whole), first["input_ids"].shape[1]
    turn = family.batch([[two, text(5, 5)]])
    own = {"attention_mask": turn["attention_mask"]}
    turn["attention_mask"] = whole["attention_mask"]
    options = {"use_cache": True, "output_attentions": True}
    masks = []
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        out = model(**first, position_ids=where[..., :split], **options)
        masks.append(oracle.kept_columns(handle, first, family.layers))
        cache = oracle.cache_of(out)
        second = model(**turn, position_ids=where[..., split:], past_key_values=cache, **options)
        masks.append(oracle.kept_columns(handle, own, family.layers))
        step = {"input_ids": torch.tensor([[7]]), "position_ids": where[..., -1:] + 1}
        third = model(**step, past_key_values=cache, **options)
    seen = [torch.cat([a, b], 1) for a, b in zip(*masks, strict=True)]
    with torch.no_grad(), oracle.masked(model, family, seen):
        full = model(**whole, position_ids=where, use_cache=False, output_attentions=True)
    width = whole["input_ids"].shape[1]
    for layer, mask in enumerate(seen):
        rows = mask[0, split:]
        expected = full.attentions[layer][0, :, split:][:, rows]
        torch.testing.assert_close(
            second.attentions[layer][0][:, rows], expected, atol=1e-5, rtol=1e-4
        )
        last = third.attentions[layer]
        assert last.shape[-2:] == (1, width + 1)
        dropped = torch.cat([~mask[0], torch.zeros(1, dtype=torch.bool)])
        assert bool((last[..., dropped] == 0).all()) and bool((last[..., ~dropped] > 0).all())


def test_the_last_hidden_state_carries_gradients(family: Family) -> None:
    """As without a patch, it is the tensor that the logits are made of."""
    model = family.build()
    with tokencomp.patch(model, 0.5):
        out = model(**single(family), output_hidden_states=True)
        out.hidden_states[-1].retain_grad()
        out.logits[0, -1].sum().backward()
    assert out.hidden_states[-1].grad is not None
    assert out.hidden_states[-1].grad[0, -1].abs().max() > 0


@pytest.mark.parametrize("kind", ["gemma3n", "hy_v4_vl"])
def test_hidden_states_in_several_streams(kind: str) -> None:
    """Gemma 3n puts its streams in front of the batch, HY-V4 after the rows."""
    if kind not in model_classes():
        pytest.skip(f"this release of transformers has no {kind}")
    model_class = getattr(transformers, model_classes()[kind])
    tiny = tiny_model(model_class, CONFIG_MAPPING[kind](), variants(kind)[0])
    prompts, layers, plan = Prompts(tiny), tiny.decoder.layers, plans.make("entry", 4)
    inputs, real = prompts.inputs(), prompts.inputs()["attention_mask"].bool()
    tiny.decoder.config.output_hidden_states = True
    states: list[Any] = []

    def note(module: Any, args: Any, out: Any) -> None:
        states.append(out.hidden_states)

    with compress(tiny.whole, plan) as handle, tiny.decoder.register_forward_hook(note):
        prompts.forward(inputs)
        (left, *_) = columns_left(handle.stats, plan, real, len(layers))
    expected: list[Tensor] = []

    def first(module: Any, args: Any, out: Any) -> None:
        expected.append(out[0] if isinstance(out, tuple) else out)

    def streams(x: Tensor) -> Any:
        """Each (B, L, d), whatever the order of their axes."""
        return x.unbind(2) if x.shape[:2] == left.shape else x.unbind(0)

    with hidden(layers, [left] * len(layers)), contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(first))
        tiny.decoder.config.output_hidden_states = False
        prompts.forward(inputs, use_cache=False)
    for here, there in zip(states[0][1:-1], expected[:-1], strict=True):
        assert here.shape == there.shape and here.ndim == 4
        for a, b in zip(streams(here), streams(there), strict=True):
            torch.testing.assert_close(a[left], b[left], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ["llava_onevision", *sorted(HYBRID)])
def test_logits_to_keep(name: str, alone: bool, layered: bool) -> None:
    """As many logits as without a patch, of the same columns, which are those of the masked run."""
    family = {**FAMILIES, **HYBRID}[name]
    rows = [[text(3), family.image(0), text(TAIL, 3)]]
    if not alone:
        rows[0][2:2] = [text(2, 2), family.image(1)]
        rows += [[text(4, 4), family.image(1), text(TAIL, 5)], [text(9, 6)]]
    model, inputs = family.build(), family.batch(rows)
    late = {"gemma4_e": 1, "gemma4": 4}.get(name, 2)
    plan = Plan((Stage(0, 0.5, UNIFORM), *(Stage(late, 0.25, UNIFORM),) * layered))
    width = inputs["input_ids"].shape[1]
    counts: list[Any] = [0, 1, TAIL - 1, TAIL, TAIL + 1, width]
    counts += [torch.tensor([width - 1]), torch.tensor([width - 2, 0, width - TAIL - 2])]
    with torch.no_grad():
        plain = [model(**inputs, logits_to_keep=k).logits.shape for k in counts]
        with tokencomp.patch(model, plan=plan) as handle:
            found = [model(**inputs, logits_to_keep=k).logits for k in counts]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        expected = oracle.masked_logits(model, family, inputs, masks)
    for k, logits, shape in zip(counts, found, plain, strict=True):
        assert logits.shape == shape
        columns = slice(-k, None) if isinstance(k, int) else k
        if shape[1] == width:  # the model ignores the argument (MiniCPM-V 4.6)
            columns = slice(None)
        left = masks[-1][:, columns]
        torch.testing.assert_close(logits[left], expected[:, columns][left], atol=5e-5, rtol=1e-5)


def test_maps_on_a_static_cache() -> None:
    """Its unwritten rows are no columns of the prompt."""
    model, inputs = FAMILIES["qwen2_vl"].build("eager"), single(FAMILIES["qwen2_vl"])
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform"):
        expected = model(**inputs, output_attentions=True).attentions
        cache = static_cache(model, 100)
        found = model(**inputs, past_key_values=cache, output_attentions=True).attentions
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_more_logits_than_text_are_no_drafts() -> None:
    """They are those of the whole prompt, whose question scores as it does for one logit."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), single(family)
    shorter = {k: v[:, :-2] if k[-4:] in ("_ids", "mask") else v for k, v in inputs.items()}
    with tokencomp.patch(model, 0.5, reducer="fastv") as handle, torch.no_grad():
        model(**shorter)
        kept = handle.stats.kept(0)
        model(**inputs, logits_to_keep=3)
        assert handle.stats.kept(0) == kept  # two drafts are not of the question
        whole = model(**inputs).logits
        assert handle.stats.kept(0) != kept
        for k in range(whole.shape[1] - handle.stats.spans[0][-1].stop + 2, whole.shape[1], 3):
            assert torch.equal(model(**inputs, logits_to_keep=k).logits, whole[:, -k:])


@pytest.mark.skipif("gemma4_e" not in HYBRID, reason="the release has no Gemma 4")
def test_a_body_whose_decoder_cuts_its_states() -> None:
    """Called on its own, it gives all columns, as it may without a patch."""
    family = HYBRID["gemma4_e"]
    model, inputs = family.build("eager"), single(family)
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform"):
        whole = model.model(**inputs).last_hidden_state
        found = model.model(**inputs, logits_to_keep=2).last_hidden_state
    torch.testing.assert_close(found, whole)
