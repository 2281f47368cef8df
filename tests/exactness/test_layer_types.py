"""Decoders with linear, sliding and full layers: prefill, decoding, beams and later turns."""

from __future__ import annotations

import pytest
import torch
from support import kinds, oracle, plans
from support.families import IMAGE, Family, text
from support.family import hybrid
from support.family.hybrid import HYBRID

import tokencomp
from tokencomp.engine.layer_types import LayerTypes
from tokencomp.errors import (
    OptionError,
    PlanError,
    RowIndexedAttentionError,
    UnsupportedCacheError,
    UnsupportedModelError,
)

FAMILY_NAMES = sorted(HYBRID)
UNSCORED = "inkling_mm_model"  # its attention logits have a bias that scores do not know
ENTRY_REDUCERS = [pytest.param(n, marks=pytest.mark.long) for n in ("condiv", "divprune")]
ENTRY = tokencomp.Plan((tokencomp.Stage(0, 0.4, tokencomp.make_reducer("uniform")),))


def staged(family: Family) -> tokencomp.Plan:
    """Half leave at entry, and half of the rest between layers as late as the family allows."""
    uniform = tokencomp.make_reducer("uniform")
    late = {"gemma4_e": 1, "gemma4": 4}.get(family.name, 2)
    return tokencomp.Plan((tokencomp.Stage(0, 0.5, uniform), tokencomp.Stage(late, 0.25, uniform)))


def ragged(family: Family) -> dict[str, torch.Tensor]:
    """A left-padded batch of two images, one image, and text alone."""
    torch.manual_seed(7)
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(5, 3)],
            [text(4, 4), family.image(1), text(4, 5)],
            [text(9, 6)],
        ]
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.thin(2)
@pytest.mark.parametrize(("backend", "layered"), [("sdpa", True), ("sdpa", False), ("eager", True)])
def test_prefill_and_decode(family: Family, backend: str, layered: bool) -> None:
    model, inputs, plan = family.build(backend), ragged(family), ENTRY
    if layered:
        plan = staged(family)
    width = inputs["input_ids"].shape[1]
    steps = 12  # more than a window, so that what has left comes out of it
    with torch.no_grad():
        plain = model(**inputs).logits[:2, -1]
    with tokencomp.patch(model, plan=plan) as handle:
        out = oracle.generate(model, inputs, steps, suppress_tokens=[*range(IMAGE, IMAGE + 5)])
        masks = oracle.kept_columns(handle, inputs, family.layers)
    logits = torch.stack(out.logits, 1)
    expected = kinds.expected_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    assert difference(logits, expected[:, width - 1 :]) < 5e-5
    assert difference(logits[:2, 0], plain) > 1e-2  # compression has an effect


def test_auto_does_not_need_attention_that_the_first_layer_lacks(family: Family) -> None:
    """The families whose first layer is a recurrence or a convolution are listed by hand."""
    model = family.build()
    linear = family.name in ("lfm2_vl", "minicpmv4_6", "qwen3_5", UNSCORED)
    with tokencomp.patch(model, 0.5) as handle, torch.no_grad():
        model(**ragged(family))
        assert handle.plan.entry.reducer.name == ("kcenter" if linear else "auto")
        assert handle.stats.ratio > 0.3
        handle.set(ratio=0.25)
        assert handle.plan.entry.reducer.name == ("kcenter" if linear else "auto")
    if linear:
        with pytest.raises(PlanError, match="first decoder layer"):
            tokencomp.patch(model, 0.5, reducer="condiv")


@pytest.mark.parametrize("name", ["uniform", pytest.param("bipartite", marks=pytest.mark.long)])
def test_batch_equals_single_rows(family: Family, name: str) -> None:
    """Without padding too: one mask that is None becomes ragged where counts differ."""
    model = family.build()
    rows = [[text(5), family.image(0), text(6, 3)], [text(4, 4), family.image(1), text(4, 5)]]
    width = max(sum(len(part if isinstance(part, list) else part.ids) for part in r) for r in rows)
    short = sum(len(part if isinstance(part, list) else part.ids) for part in rows[1])
    rows[1][0] = text(4 + width - short, 4)  # both prompts have one length
    batch = family.batch(rows)
    assert bool(batch["attention_mask"].all())
    with tokencomp.patch(model, 0.6, reducer=name), torch.no_grad():
        together = oracle.generate(model, batch, 4)
        alone = [oracle.generate(model, family.batch([row]), 4) for row in rows]
        beams = oracle.generate(model, batch, 4, num_beams=3).sequences[:, width:]
        lone = [oracle.generate(model, family.batch([r]), 4, num_beams=3) for r in rows]
    for b, single in enumerate(alone):
        pairs = zip(together.logits, single.logits, strict=True)
        assert max(difference(x[b], y[0]) for x, y in pairs) < 5e-5
        assert torch.equal(beams[b], lone[b].sequences[0, width:])


def test_later_turns(family: Family) -> None:
    """Several tokens at once on a ragged cache, then a second image in a batch of one."""
    model, inputs = family.build(), ragged(family)
    width, later = inputs["input_ids"].shape[1], torch.tensor([text(5, 20 + b) for b in range(3)])
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        positions = family.positions(model, inputs)
        out = model(**inputs, position_ids=positions, use_cache=True)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        whole = kinds.continued(inputs, positions, later)
        turn = {
            "input_ids": later,
            "attention_mask": whole["attention_mask"],
            "position_ids": whole["position_ids"][..., width:],
            oracle.cache_name(out): oracle.cache_of(out),
        }
        logits = model(**turn, use_cache=True).logits
    expected = kinds.expected_logits(model, family, inputs, masks, later)[:, width:]
    assert difference(logits, expected) < 5e-5


def test_second_image(family: Family) -> None:
    """A later turn with an image: prefill of the whole conversation is the same."""
    model = family.build()
    first = family.batch([[text(3), family.image(0), text(5, 3)]])
    second = family.batch([[text(2, 9), family.image(1), text(4, 8)]])
    width = first["input_ids"].shape[1]
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        positions = family.positions(model, first)
        out = model(**first, position_ids=positions, use_cache=True)
        masks = oracle.kept_columns(handle, first, family.layers)
        turn = {**second, oracle.cache_name(out): oracle.cache_of(out)}
        own = family.positions(model, second) + positions.max() + 1
        turn["attention_mask"] = torch.ones(1, width + second["input_ids"].shape[1]).long()
        logits = model(**turn, position_ids=own, use_cache=True).logits[:, -1]
        more = oracle.kept_columns(handle, second, family.layers)
    # The oracle has two turns as well: transformers lets no image of a later turn see itself.
    both = [torch.cat(pair, 1) for pair in zip(masks, more, strict=True)]
    model.set_attn_implementation("eager")
    decoder, turn["attention_mask"] = family.decoder(model), torch.ones(1, both[0].shape[1]).long()
    with torch.no_grad():
        with kinds.hidden_columns(decoder, masks):
            out = model(**first, position_ids=positions, use_cache=True)
        turn[oracle.cache_name(out)] = oracle.cache_of(out)
        with kinds.hidden_columns(decoder, both):
            expected = model(**turn, position_ids=own, use_cache=True).logits[:, -1]
    assert difference(logits, expected) < 5e-5


def test_videos(family: Family) -> None:
    """Frames with text between them beside an image, and another video, in a ragged batch."""
    if not hasattr(family, "whole_video"):
        pytest.skip("its processor takes no videos")
    model = family.build()
    first = [text(3), family.image(0), text(2), family.whole_video(4), text(5, 3)]
    inputs = family.batch([first, [family.whole_video(4), text(4, 5)], [text(9, 6)]])
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, plan=ENTRY) as handle:
        out = oracle.generate(model, inputs, 4, suppress_tokens=[*range(IMAGE, IMAGE + 5)])
        masks = oracle.kept_columns(handle, inputs, family.layers)
        spans = [s for row in handle.stats.spans for s in row]
    assert [s.modality for s in spans if s.modality == "image"] == ["image"]
    _, rows, columns = spans[-1].grid  # two frames of two videos
    assert sum(s.visual for s in spans if s.modality == "video") == 4 * rows * columns
    assert all(s.grid_known for s in spans)
    expected = kinds.expected_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    assert difference(torch.stack(out.logits, 1), expected[:, width - 1 :]) < 5e-5


def test_stats_count_keys_and_values(family: Family) -> None:
    """Bytes of the cache that a prefill of one prompt leaves."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(5, 3)]])
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        cache = oracle.cache_of(model(**inputs, use_cache=True))
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    held = sum(2 * k.numel() * k.element_size() for k in keys if k is not None)
    assert handle.stats.kv_bytes_after == held
    assert handle.stats.kv_bytes_before > held


def test_a_ragged_turn_is_refused_beside_linear_layers(family: Family) -> None:
    model, inputs = family.build(), ragged(family)
    if not LayerTypes.of(family.decoder(model)).linear:
        pytest.skip("no linear layers")
    with tokencomp.patch(model, plan=ENTRY), torch.no_grad():
        out = model(**inputs, use_cache=True)
        rows = [[text(2, 9), family.image(b), text(4, 8)] for b in (0, 1)]
        second = family.batch([*rows, [text(4)]])
        positions = family.positions(model, second) + 40
        masks = [inputs["attention_mask"], second["attention_mask"]]
        turn = {**second, "attention_mask": torch.cat(masks, 1), "position_ids": positions}
        turn[oracle.cache_name(out)] = oracle.cache_of(out)
        with pytest.raises(UnsupportedCacheError, match="linear"):
            model(**turn)


def test_queries_that_are_scaled_by_their_row_are_refused() -> None:
    """Up to the limit the scale is one."""
    if UNSCORED not in HYBRID:
        pytest.skip("the release has no such model")
    family = HYBRID[UNSCORED]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(5, 3)]])
    model.config.text_config.log_scaling_n_floor = inputs["input_ids"].shape[1] + 1
    with tokencomp.patch(model, 0.5), torch.no_grad():
        model(**inputs)
    model.config.text_config.log_scaling_n_floor -= 1
    refused = pytest.raises(RowIndexedAttentionError, match="log_scaling_n_floor")
    with tokencomp.patch(model, 0.5), torch.no_grad(), refused:
        model(**inputs)


def test_unknown_kinds_are_refused(family: Family) -> None:
    model = family.build()
    model.config.text_config.layer_types = ["compressed_sparse_attention"] * family.layers
    with pytest.raises(UnsupportedModelError, match="compressed_sparse_attention"):
        tokencomp.patch(model, 0.5, reducer="uniform")


def test_scores_of_the_nearest_full_layer(family: Family) -> None:
    """A stage behind a linear or sliding layer is scored by the full layer before it."""
    if family.name in ("gemma4_e", UNSCORED):
        pytest.skip("its stages stand before the first full layer, or it has no scores")
    model = family.build("eager")
    layer_types = [one.name for one in LayerTypes.of(family.decoder(model)).types]
    scored = layer_types.index("full_attention")
    stage = scored + (2 if layer_types[scored + 1] != "full_attention" else 1)
    inputs = family.batch([[text(3), family.image(0), text(5, 3)]])
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    weights = [m for m in maps if m is not None]
    if len(weights) == family.layers:
        weights = [weights[scored]]
    received = weights[0][0].mean(0)[visual[-1] + 1 :][:, visual].mean(0)
    reducer = plans.TextTop()
    plan = tokencomp.Plan((tokencomp.Stage(stage, 0.25, reducer),))
    with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.stats.kept()[0][0]
    highest = received.topk(len(kept)).values  # values, since some tokens are as good as equal
    torch.testing.assert_close(received[kept].sort(descending=True).values, highest)


def test_two_stages_behind_one_layer_with_attention(family: Family) -> None:
    """The second goes by what the first went by, as far as it is left."""
    model = family.build("eager")
    if not LayerTypes.of(family.decoder(model)).linear or family.name == UNSCORED:
        pytest.skip("every layer has attention, or none has scores")
    inputs = family.batch([[text(3), family.image(0), text(5, 3)]])
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    reducer, other = plans.TextTop(), ENTRY.entry.reducer
    stages = ((2, 0.75, other), (3, 0.25, reducer))  # layer 1 has attention, and layer 2 has none
    plan = tokencomp.Plan(tuple(tokencomp.Stage(*stage) for stage in stages))
    with torch.no_grad():
        maps = [m for m in model(**inputs, output_attentions=True).attentions if m is not None]
        received = maps[0][0].mean(0)[visual[-1] + 1 :][:, visual].mean(0)
        with tokencomp.patch(model, plan=plan) as handle:
            model(**inputs)
            first, second = (kept[0] for kept in handle.stats.kept())
    highest = received[first].topk(len(second)).values
    torch.testing.assert_close(received[second].sort(descending=True).values, highest)
    assert len(second) == 4 and len(first) == 12


WEIGHTED = [n if n in ("gemma3", "gemma4_e") else pytest.param(n, marks=pytest.mark.long)
            for n in FAMILY_NAMES if n != UNSCORED]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_merged_rows(name: str) -> None:
    """In windows, in blocks of images that see each other, and where layers share keys."""
    family = HYBRID[name]
    model, inputs, steps = family.build(), ragged(family), 12
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, 0.6, reducer="kcenter", merge=True) as handle:
        out = oracle.generate(model, inputs, steps, suppress_tokens=[*range(IMAGE, IMAGE + 5)])
        masks = oracle.kept_columns(handle, inputs, family.layers)
    merged, new = oracle.Merged(handle), out.sequences[:, width:-1]
    expected = kinds.expected_logits(model, family, inputs, masks, new, merged)
    plain = kinds.expected_logits(model, family, inputs, masks, new)
    logits = torch.stack(out.logits, 1)
    assert difference(logits, expected[:, width - 1 :]) < 5e-5
    assert difference(logits, plain[:, width - 1 :]) > 1e-3


@pytest.mark.parametrize("reducer", ["prune", "pyramiddrop", *ENTRY_REDUCERS])
def test_reducers_by_name(family: Family, reducer: str) -> None:
    """At entry, and with stages before and behind layers of every kind."""
    between = reducer in ("prune", "pyramiddrop")
    if between and family.name in ("gemma4_e", UNSCORED):
        pytest.skip("its last layers read the keys of the first, or it has no scores")
    if reducer == "condiv" and LayerTypes.of(family.decoder(family.build())).linear:
        pytest.skip("its first layer has no attention")
    model, inputs = family.build(), ragged(family)
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, 0.2, reducer=reducer) as handle:
        out = oracle.generate(model, inputs, 4, suppress_tokens=[*range(IMAGE, IMAGE + 5)])
        masks = oracle.kept_columns(handle, inputs, family.layers)
        assert bool(handle.plan.layer_stages) == between
    expected = kinds.expected_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    assert difference(torch.stack(out.logits, 1), expected[:, width - 1 :]) < 5e-5


def test_stages_that_nothing_can_score_are_refused(family: Family) -> None:
    """No layer before the second has attention, where the first one is linear."""
    model, reducer = family.build(), plans.TextTop()
    plan = tokencomp.Plan((tokencomp.Stage(1, 0.25, reducer),))
    if not LayerTypes.of(family.decoder(model)).linear:
        with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
            model(**ragged(family))  # keys that the window has cut from the cache are read too
            assert handle.stats.ratio > 0.4
        return
    why = "a bias by distance" if family.name == UNSCORED else "none of the layers 0 to 0 has"
    with pytest.raises(PlanError, match=why):
        tokencomp.patch(model, plan=plan)
    images = tokencomp.Plan((tokencomp.Stage(1, 0.0, reducer, by_modality=(("image", 0.25),)),))
    with tokencomp.patch(model, plan=ENTRY) as handle:
        with pytest.raises(PlanError, match=why):
            handle.set(plan=images)
        handle.set(plan=ENTRY)  # the patch is still there


@pytest.mark.parametrize("name", [n for n in ("gemma3", "gemma4") if n in HYBRID])
def test_compact_positions_beside_masks_of_the_body(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the model on the kept embeddings alone; a window that the body applied is refused."""
    family = HYBRID[name]
    inputs = family.batch([[text(3), family.image(), text(12, 3), family.image(), text(5, 4)]])
    model = family.build("eager")
    handle = tokencomp.patch(model, 0.5, positions="compact")
    with handle, pytest.raises(OptionError, match=r"sliding-window masks \(8\) from uncompressed"):
        model(**inputs)
    monkeypatch.setattr(hybrid, "WINDOW", 64)
    model, embeds = type(family)().build("eager"), []  # models are kept by family

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        embeds.append(kwargs["inputs_embeds"])

    with torch.no_grad():
        with tokencomp.patch(model, 0.5, reducer="uniform", positions="compact") as handle:
            found = model(**inputs).logits
            left = oracle.kept_columns(handle, inputs, family.layers)[-1][0]
        hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        model(**inputs)
        hook.remove()
        columns = ("attention_mask", "token_type_ids", "mm_token_type_ids")
        short = {k: inputs[k][:, left] for k in columns if k in inputs}
        expected = model(inputs_embeds=embeds[0][:, left], **short).logits
    assert difference(found[:, left], expected) < 1e-5
    assert int(left.sum()) < len(left) - 15
