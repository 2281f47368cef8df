"""Which layers read the keys of earlier ones, in all releases alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokencomp.torchlib.compat import kv_sharing_modes


@pytest.mark.parametrize("shared", [0, 2, 3, 5])
def test_lists_of_older_releases_are_those_of_newer_ones(shared: int) -> None:
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("the release has no Gemma 4")
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    config = CONFIG_MAPPING["gemma4_text"](
        num_hidden_layers=9, layer_types=kinds, num_kv_shared_layers=shared
    )
    older = SimpleNamespace(layer_types=kinds, num_kv_shared_layers=shared)
    modes = kv_sharing_modes(config)
    assert modes.count("reuse") == shared
    assert kv_sharing_modes(older) == (modes if shared else [])
