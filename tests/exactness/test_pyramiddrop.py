"""PyramidDrop's choices against the attention maps that transformers computes with masks."""

from __future__ import annotations

import torch
from support import oracle
from support.families import FAMILIES, Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage


def attention_of_last_row(
    model: nn.Module, family: Family, inputs: dict[str, Tensor], masks: list[Tensor], layer: int
) -> Tensor:
    """Attention (B, L) of the last token in a decoder layer, mean over heads."""
    positions = family.positions(model, inputs)
    with torch.no_grad(), oracle.layer_masks(model, family, masks):
        out = model(**inputs, position_ids=positions, use_cache=False, output_attentions=True)
    return out.attentions[layer].mean(1)[:, -1]


def test_every_cut_ranks_by_the_layer_after_it(family: Family) -> None:
    """The layer before which tokens leave ranks them, with all that have come as far as it."""
    model = family.build("eager")
    inputs = family.batch(
        [[text(3), family.image(), text(5, 2)], [text(2), family.image(1), text(4)]]
    )
    reducer = tokencomp.make_reducer("pyramiddrop").plan(0.4, family.layers).stages[0].reducer
    cuts = (1, 3) if family.name not in ("qwen3_vl", "qwen3_vl_moe") else (2, 3)
    plan = Plan((Stage(cuts[0], 0.6, reducer), Stage(cuts[1], 0.3, reducer)))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        model(**inputs)
        stats = handle.stats
        after = oracle.kept_columns(handle, inputs, family.layers)
    before = inputs["attention_mask"].bool()
    for order, cut in enumerate(cuts):
        masks = [*after[:cut], *[before] * (family.layers - cut)]  # the cut has not happened
        scores = attention_of_last_row(model, family, inputs, masks, cut)
        for b, spans in enumerate(stats.spans):
            for span, kept in zip(spans, stats.kept(b)[order], strict=True):
                here = scores[b, span.start : span.stop].clone()
                here[~before[b, span.start : span.stop]] = -torch.inf
                here[span.special_mask()] = torch.inf
                best = here.sort(descending=True, stable=True).indices[: len(kept)]
                assert kept == best.sort().values.tolist(), (cut, b)
        before = after[cut]


def test_a_second_turn_ranks_with_the_first_in_the_cache() -> None:
    """Keys of the earlier turn take their share of every row, in the layer that ranks."""
    family = FAMILIES["qwen2_vl"]
    model = family.build("eager")
    first = family.batch([[text(6)]])
    second = family.batch([[text(3), family.image(), text(5, 2)]])
    whole = {
        **second,
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "attention_mask": torch.cat([first["attention_mask"], second["attention_mask"]], 1),
    }
    if "mm_token_type_ids" in second:
        kinds = first["mm_token_type_ids"], second["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat(kinds, 1)
    reducer = tokencomp.make_reducer("pyramiddrop").plan(0.4, family.layers).stages[0].reducer
    plan = Plan((Stage(2, 0.4, reducer),))
    positions = family.positions(model, whole)
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        cache = oracle.cache_of(model(**first, use_cache=True))
        given = {**second, "attention_mask": whole["attention_mask"]}
        # the caller's own positions: those of the second turn within the whole conversation
        model(**given, position_ids=positions[..., 6:], past_key_values=cache, use_cache=True)
        (kept,) = handle.stats.kept(0)[0]
        (span,) = handle.stats.spans[0]
    masks = [whole["attention_mask"].bool()] * family.layers
    scores = attention_of_last_row(model, family, whole, masks, 2)[0]
    here = scores[6 + span.start : 6 + span.stop]
    assert (
        kept == here.sort(descending=True, stable=True).indices[: len(kept)].sort().values.tolist()
    )
