"""DART's choice against hidden states and keys that the unpatched model shows to plain hooks."""

from __future__ import annotations

import math

import pytest
import torch
from support.families import Family, text
from torch import Tensor

import tokencomp
from tokencomp.adapters.registry import adapter_for


def seen(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Behind layer 1: hidden states through the final norm; lengths of that layer's keys."""
    decoder, found = adapter_for(model).decoder, {}
    attn = decoder.layers[1].self_attn
    # A norm of the keys (Qwen3) follows the projection.
    named = attn.k_norm if hasattr(attn, "k_norm") else attn.k_proj
    hooks = [
        named.register_forward_hook(lambda m, args, out: found.update(keys=out)),
        decoder.layers[2].register_forward_pre_hook(
            lambda m, args, kwargs: found.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    lengths = found["keys"].abs().flatten(2).sum(2)
    return torch.nn.functional.normalize(decoder.norm(found["x"]), dim=-1), lengths


def chosen(x: Tensor, text_rows: Tensor, lengths: Tensor, own: Tensor, keep: int) -> list[int]:
    order = lengths.sort(descending=True, stable=True).indices[: min(4, keep)].tolist()
    pivots = [x[i] for i in order]
    pivots += [text_rows[i] for i in own.sort(descending=True, stable=True).indices[:4]]
    share = math.ceil((keep - len(order)) / len(pivots))
    for pivot in pivots:
        alike = (x @ pivot).tolist()
        rest = sorted({*range(len(x))} - {*order}, key=lambda i: (alike[i], i))
        order += rest[: min(share, keep - len(order))]
    return sorted(order)


@torch.no_grad()
def test_the_cut_before_layer_2(family: Family) -> None:
    model = family.build()
    if model.config.model_type in ("qwen3_vl", "qwen3_vl_moe"):
        pytest.skip("vision features join layers up to 2, so that the cut comes later")
    inputs = family.batch(
        [[text(3), family.image(), text(9, 2)], [text(2), family.image(1), text(6)]]
    )
    states, lengths = seen(model, inputs)
    with tokencomp.patch(model, 0.3, reducer="dart") as handle:
        (stage,) = handle.plan.stages
        model(**inputs)
        stats = handle.stats
    assert stage.layer == 2
    for b, spans in enumerate(stats.spans):
        last = spans[-1].stop
        for span, kept in zip(spans, stats.kept(b)[0], strict=True):
            special = span.special_mask()
            rows = torch.arange(span.start, span.stop)[~special]
            own = chosen(
                states[b, rows], states[b, last:], lengths[b, rows], lengths[b, last:],
                len(kept) - int(special.sum()),
            )  # fmt: skip
            expected = (rows[own] - span.start).tolist() + special.nonzero()[:, 0].tolist()
            assert kept == sorted(expected)
