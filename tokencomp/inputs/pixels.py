"""A bound on the pixels of images, so that the vision tower sees fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from tokencomp.errors import OptionError, UnsupportedModelError

SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Values of `max_soft_tokens` in Gemma 4's image processor."""
LARGE = ((4096, 4096), (2048, 6144), (6144, 2048))
"""Height and width of images by which a bound is checked."""


def limit_image_tokens(processor: Any, tokens: int) -> Any:
    """A copy of a processor that scales every image down to at most `tokens` visual tokens.

    It sets what the image processor has for this: the pixels of an image in the families of
    Qwen-VL, GLM-V, ERNIE, PaddleOCR-VL and Video-LLaMA 3, or the number of tokens in Gemma 4 and
    GLM 5. Smaller images, and videos, are unchanged. An image that is more than `tokens` times
    as long as wide has more tokens, as no side gets shorter than one.

    Parameters
    ----------
    processor
        A Hugging Face processor; it is not changed.
    tokens
        Of one image, before a patched model compresses them.

    Raises
    ------
    OptionError
        `tokens` is not a positive whole number, or below what the processor allows.
    UnsupportedModelError
        The processor has no such bound: it gives all images one size, or cuts them into tiles.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise OptionError(f"{tokens!r} tokens of an image: expected a positive whole number.")
    images = getattr(processor, "image_processor", None)
    for values in _candidates(images, tokens):
        limited = copy.deepcopy(images)
        for name, value in values.items():
            setattr(limited, name, value)
        if _holds(limited, tokens):
            result = copy.copy(processor)
            result.image_processor = limited
            return result
    raise UnsupportedModelError(
        f"at most {tokens} tokens of an image: {type(images).__name__} has no such bound, because "
        "it gives all images one size or cuts them into tiles. Scale the images before, or leave "
        "the bound out: a budget holds without it."
    )


def _candidates(images: Any, tokens: int) -> Iterator[dict[str, Any]]:
    """Settings of an image processor that may be the bound, the largest first."""
    if (usual := getattr(images, "max_soft_tokens", None)) is not None:
        allowed = [n for n in SOFT_TOKENS if n <= min(tokens, usual)]
        if not allowed:
            raise OptionError(f"{tokens} tokens of an image: this processor allows {SOFT_TOKENS}.")
        yield {"max_soft_tokens": allowed[-1]}
    elif (usual := getattr(images, "max_image_tokens", None)) is not None:
        least = getattr(images, "min_image_tokens", 0)
        yield {"max_image_tokens": min(tokens, usual), "min_image_tokens": min(tokens, least)}
    given = getattr(images, "size", None) or {}
    size = {k: v for k, v in (given if isinstance(given, dict) else vars(given)).items() if v}
    if set(size) == {"shortest_edge", "longest_edge"} and hasattr(images, "merge_size"):
        # Both are numbers of pixels of one image, or in GLM-V of its repeated frames.
        frames = getattr(images, "temporal_patch_size", 1)
        for n in sorted({1, frames}, reverse=True):
            pixels = n * tokens * (images.patch_size * images.merge_size) ** 2
            edges = {name: min(edge, pixels) for name, edge in size.items()}
            yield {"size": type(given)(**edges)}


def _holds(images: Any, tokens: int) -> bool:
    """Whether an image processor produces at most this many tokens for large images."""
    count = getattr(images, "get_number_of_image_patches", None)
    if count is None:
        return hasattr(images, "max_soft_tokens")  # which is the number of tokens itself
    patches = [count(*size, {}) for size in LARGE]
    return all(isinstance(n, int) and n <= tokens * images.merge_size**2 for n in patches)
