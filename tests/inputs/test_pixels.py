"""A bound on the tokens of an image, in the processors of several families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from tokencomp import zoo
from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.pixels import limit_image_tokens
from tokencomp.inputs.prompts import build_inputs, prompt_lengths

SIZES = ((224, 224), (900, 300), (120, 1400), (60, 60))


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("tokens", [1, 7, 16, 40, 1000])
def test_prompts_have_at_most_so_many_visual_tokens(tokens: int) -> None:
    """Larger images are scaled down as far as needed; smaller ones and the processor stay."""
    model, processor = zoo.load()
    _, limited = load_model(image_max_tokens=tokens)
    usual = processor.image_processor.size["longest_edge"]
    for size in SIZES:
        if max(size) > tokens * min(size):
            continue  # one token wide, and longer than the bound
        media = [[picture(*size)]]
        inputs = [build_inputs(p, media, ["?"]) for p in (processor, limited)]
        (_, whole), (_, seen) = (prompt_lengths(model, one)[0] for one in inputs)
        assert seen <= tokens and (seen == whole if whole <= tokens else 2 * seen >= tokens - 4)
    limit_image_tokens(processor, tokens)
    assert processor.image_processor.size["longest_edge"] == usual


def counted(images: Any, size: tuple[int, int]) -> int:
    """Visual tokens of one image, by the grid that the processor gives to the model."""
    out = images(images=[picture(*size)], return_tensors="pt")
    if "num_soft_tokens_per_image" in out:
        return int(out["num_soft_tokens_per_image"][0])
    return int(out["image_grid_thw"][0].prod()) // images.merge_size**2


@pytest.mark.parametrize("name", ["Qwen2VL", "Glm4v", "Ernie4_5_VLMoe", "Gemma4"])
def test_families_with_a_bound(name: str) -> None:
    if not hasattr(transformers, f"{name}ImageProcessor"):
        pytest.skip(f"this release has no {name}")
    images = getattr(transformers, f"{name}ImageProcessor")()
    assert counted(images, (1500, 1000)) > 150
    limited = limit_image_tokens(SimpleNamespace(image_processor=images), 150)
    assert 75 < counted(limited.image_processor, (1500, 1000)) <= 150


@pytest.mark.parametrize(
    "name", ["LlavaOnevision", "GotOcr2", "SmolVLM", "Pixtral", "Siglip", "HunYuanVL"]
)
def test_families_without_one(name: str) -> None:
    if not hasattr(transformers, f"{name}ImageProcessor"):
        pytest.skip(f"this release has no {name}")
    images = getattr(transformers, f"{name}ImageProcessor")()
    with pytest.raises(UnsupportedModelError, match=name):
        limit_image_tokens(SimpleNamespace(image_processor=images), 150)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "8", True])
def test_bad_bounds(tokens: Any) -> None:
    with pytest.raises(OptionError, match="positive"):
        limit_image_tokens(SimpleNamespace(image_processor=None), tokens)
