"""Decoder layers of older releases, whose arguments are not those of every other decoder."""

from __future__ import annotations

from typing import Any

import pytest
from support.families import FAMILIES, Family

import tokencomp
from tokencomp.errors import PlanError


def tables(
    self: Any, hidden_states: Any, position_embeddings_global: Any, position_embeddings_local: Any
) -> None:
    """What a layer of Gemma 3 takes before transformers 5."""


def numbers(self: Any, hidden_states: Any, cache_position: Any, position_embeddings: Any) -> None:
    """What a layer of Llama 4 takes before transformers 5.4."""


def with_layers(family: Family, forward: Any, **options: Any) -> Any:
    """A model whose first layer has this signature, and its config these options."""
    model = family.build()
    decoder = family.decoder(model)
    layer = decoder.layers[0]
    layer.__class__ = type("OldLayer", (type(layer),), {"forward": forward})
    vars(decoder.config).update(options)
    return model


@pytest.mark.parametrize(
    ("forward", "options", "reason"),
    [
        (tables, {}, "two pairs of rotary tables"),
        (numbers, {"attn_temperature_tuning": True}, "scale.? attention by cache_position"),
    ],
)
@pytest.mark.parametrize("reducer", ["fastv", "prune", "condiv"])
def test_they_are_compressed_at_entry_without_scores(
    reducer: str, forward: Any, options: dict[str, Any], reason: str
) -> None:
    model = with_layers(FAMILIES["qwen2_vl"], forward, **options)
    with pytest.raises(PlanError, match=reason):
        tokencomp.patch(model, 0.5, reducer=reducer)
    tokencomp.patch(model, 0.5, reducer="divprune").remove()


def test_cache_positions_alone_are_no_reason() -> None:
    model = with_layers(FAMILIES["qwen2_vl"], numbers)
    tokencomp.patch(model, 0.5, reducer="fastv").remove()
