"""`generate_batch` of a patched model."""

from __future__ import annotations

from typing import Any

import pytest
from support.caches import ENTRY, single
from support.families import NO_EOS, Family, text
from transformers import GenerationConfig

import tokencomp
from tokencomp.errors import NoVisualInputError, UnsupportedCacheError

FAMILY_NAMES = ("llava_onevision", "qwen2_vl")

CONFIG = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=NO_EOS, pad_token_id=0)
PROMPTS = [text(9), text(6, 2)]


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    out = model.generate_batch(inputs=prompts, generation_config=CONFIG, progress_bar=False)
    return [result.generated_tokens for result in out.values()]


@pytest.mark.long
def test_text_is_batched_as_without_a_patch(family: Family) -> None:
    model = family.build()
    try:
        expected = answers(model, PROMPTS)
    except (AttributeError, ValueError):
        expected = []
    if not expected or not all(expected):
        pytest.skip("this transformers cannot batch a multimodal model continuously, unpatched")
    with tokencomp.patch(model, 0.5):
        assert answers(model, PROMPTS) == expected
    assert "generate_batch" not in model.__dict__


def test_media_are_refused(family: Family) -> None:
    model, inputs = family.build(), single(family)
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    ids = inputs["input_ids"].tolist()
    with tokencomp.patch(model, plan=ENTRY):
        with pytest.raises(UnsupportedCacheError, match=r"prompt 1 has \d+ placeholders"):
            answers(model, [text(4), *ids])
        with pytest.raises(UnsupportedCacheError, match="this call brings images"):
            model.generate(**inputs, generation_config=CONFIG, cache_implementation="paged")
    refused = pytest.raises(NoVisualInputError, match="continuous batching")
    with tokencomp.patch(model, plan=ENTRY, strict=True), refused:
        answers(model, PROMPTS)
