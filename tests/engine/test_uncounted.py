"""At ratio 0 a prompt is read when its stats are, with the same result as at once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.families import FAMILIES, text

import tokencomp


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "smolvlm"])
def test_counts_are_those_that_a_compressed_prompt_starts_from(name: str) -> None:
    """Read after some tokens were generated, and in the place of an earlier prompt."""
    family = FAMILIES[name]
    model = family.build()
    short = family.batch([[text(2), family.image(2), text(3, 1)]])
    inputs = family.batch([[text(3), family.image(0), text(5, 2)], [family.image(1), text(4, 9)]])
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model.generate(**inputs, max_new_tokens=2)
        expected = handle.stats
    with tokencomp.patch(model, 0.0) as handle:
        model.generate(**short, max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2)
        stats = handle.stats
    assert stats and handle.stats is stats
    assert stats.spans == expected.spans
    assert (stats.tokens_before, stats.lengths) == (expected.tokens_before, expected.lengths)
    assert stats.flops_before == stats.flops_after == expected.flops_before
    assert stats.kv_bytes_after == expected.kv_bytes_before


def test_pixels_and_cache_are_not_kept() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(5, 2)]])
    with tokencomp.patch(model, 0.0) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        pixels, cache = weakref.ref(inputs["pixel_values"]), weakref.ref(out.past_key_values)
        del inputs, out
        gc.collect()
        assert pixels() is None and cache() is None
        assert handle.stats.ratio == 0.0 and sum(handle.stats.tokens_before) > 0
