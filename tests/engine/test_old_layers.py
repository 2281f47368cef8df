"""Decoder layers of older releases, whose arguments are not those of every other decoder."""

from __future__ import annotations

from typing import Any

import pytest
from support.families import FAMILIES, Family

import tokencomp
from tokencomp.adapters.row_scales import row_scales
from tokencomp.errors import PlanError

MINISTRAL = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384}


def tables(
    self: Any, hidden_states: Any, position_embeddings_global: Any, position_embeddings_local: Any
) -> None:
    """What a layer of Gemma 3 takes before transformers 5."""


def numbers(self: Any, hidden_states: Any, cache_position: Any, position_embeddings: Any) -> None:
    """What a layer of Llama 4 or Ministral 3 takes before transformers 5.4."""


def positions(self: Any, hidden_states: Any, position_ids: Any, position_embeddings: Any) -> None:
    """What a layer of Ministral 3 takes since transformers 5.4."""


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
        (numbers, {"rope_parameters": MINISTRAL}, "scale.? attention by cache_position"),
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


def test_ministral_scaled_by_rows_and_does_by_positions() -> None:
    """What is refused from that row on, see test_attention_window.py."""
    old = with_layers(FAMILIES["llava"], numbers, rope_parameters=MINISTRAL)
    assert row_scales(FAMILIES["llava"].decoder(old)) == {"original_max_position_embeddings": 16384}
    new = with_layers(FAMILIES["llava"], positions, rope_parameters=MINISTRAL)
    assert row_scales(FAMILIES["llava"].decoder(new)) == {}
