"""Merged rows in the cache of a model with convolutions: as prompts without a cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.run import model_classes
from benchmarks.conformance.variants import variants
from tokencomp.conformance.build import tiny_model
from tokencomp.conformance.prompts import Prompts

STEPS = 4


# With convolutions, whose mask takes no weights. Of all other types conformance compares them.
@pytest.mark.parametrize("model_type", ["lfm2_vl"])
def test_decode_steps_equal_prompts_without_a_cache(model_type: str) -> None:
    """There, attention gets weights; on the cache, rows stand as often as they count."""
    model_class = getattr(transformers, model_classes().get(model_type, ""), None)
    if model_class is None:
        pytest.skip("the installed release has no such type")
    for variant in variants(model_type):
        tiny = tiny_model(model_class, CONFIG_MAPPING[model_type](), variant)
        prompts = Prompts(tiny)
        if prompts.medium == "audio":
            pytest.skip("sounds are not merged")
        with tokencomp.patch(tiny.whole, 0.6, reducer="kcenter", merge="auto") as handle:
            if not handle.plan.may_merge:
                pytest.skip("its attention takes no weights")
            for rows in ([0], [0, 1]):
                words, logits = prompts.generate(prompts.inputs(rows), STEPS)
                assert handle.stats.merged_from == 0
                for step in range(STEPS):
                    whole = prompts.forward(prompts.inputs(rows, words[:, :step])).logits[:, -1]
                    scale = max(1.0, float(whole.abs().max()))
                    torch.testing.assert_close(
                        whole / scale, logits[:, step] / scale, atol=2e-5, rtol=0
                    )
