"""A model's own budget of visual tokens, as a baseline: fewer tokens as its makers offer them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import NATIVE, Setting

# The setting of an image processor that limits the tokens of one image, and the values that it
# may have; None is any number. Sources: Gemma 4's and LFM2-VL's processors in transformers.
BUDGETS: dict[str, tuple[int, ...] | None] = {
    "max_soft_tokens": (70, 140, 280, 560, 1120),
    "max_image_tokens": None,
}


def budget_of(processor: Any, setting: Setting) -> contextlib.AbstractContextManager[Any]:
    """The context in which the processor makes the inputs of a setting."""
    if setting.reducer != NATIVE:
        return contextlib.nullcontext()
    return native_budget(processor, setting.ratio)


def has_budget(processor: Any) -> bool:
    """Whether the processor offers a budget of visual tokens per image."""
    return _knob(processor) is not None


def _knob(processor: Any) -> str | None:
    images = getattr(processor, "image_processor", None)
    return next((name for name in BUDGETS if isinstance(getattr(images, name, None), int)), None)


@contextlib.contextmanager
def native_budget(processor: Any, ratio: float) -> Iterator[int]:
    """The processor with the budget nearest to `1 - ratio` of its usual one inside the block.

    Yields
    ------
    int
        The budget, in visual tokens per image; of two as near, the smaller one.

    Raises
    ------
    OptionError
        The model has no such budget.
    """
    name = _knob(processor)
    if name is None:
        raise OptionError(
            "this model's processor has no budget of visual tokens of its own; use 'downscale' "
            f"as the baseline. Known are {', '.join(BUDGETS)}."
        )
    images, allowed = processor.image_processor, BUDGETS[name]
    usual = getattr(images, name)
    target = (1 - ratio) * usual
    budget = (
        max(1, round(target))
        if allowed is None
        else min(allowed, key=lambda n: (abs(n - target), n))
    )
    setattr(images, name, budget)
    if hasattr(images, "min_image_tokens"):
        least = images.min_image_tokens
        images.min_image_tokens = min(least, budget)
    try:
        yield budget
    finally:
        setattr(images, name, usual)
        if hasattr(images, "min_image_tokens"):
            images.min_image_tokens = least
