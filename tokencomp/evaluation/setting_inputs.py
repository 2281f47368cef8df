"""What the processor makes of media and prompts under a setting.

Input baselines shrink the media, or take a model's own budget of visual tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.settings import NATIVE, Setting
from tokencomp.inputs.prompts import build_inputs

# The setting of an image processor that limits the tokens of one image, and the values that it
# may have; None is any number. Sources: Gemma 4's and LFM2-VL's processors in transformers.
BUDGETS: dict[str, tuple[int, ...] | None] = {
    "max_soft_tokens": (70, 140, 280, 560, 1120),
    "max_image_tokens": None,
}


class SettingInputs:
    """Builds the prompts of a setting for the variants of one model, any of which is `model`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.processor = processor
        self._placeholders = list(adapter_for(model).placeholders)
        self._equal_tokens: dict[str, EqualTokens] = {}

    def equal_tokens(self, setting: Setting) -> EqualTokens:
        """What counts tokens and shrinks media for an input baseline; it remembers both."""
        name = setting.name
        if name not in self._equal_tokens:
            self._equal_tokens[name] = EqualTokens(self.processor, self._placeholders, name)
        return self._equal_tokens[name]

    def shrunk(self, setting: Setting, media: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        """The media of every row: smaller under an input baseline, unchanged otherwise."""
        if not setting.input_baseline or setting.reducer == NATIVE:
            return media
        shrink = self.equal_tokens(setting).shrink
        return [[shrink(m, setting.ratio) for m in row] for row in media]

    def build(
        self, setting: Setting, media: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """The inputs of one batch on the CPU, of media as `shrunk` returns them."""
        native = setting.reducer == NATIVE
        with native_budget(self.processor, setting.ratio) if native else contextlib.nullcontext():
            return build_inputs(self.processor, media, prompts)


def has_budget(processor: Any) -> bool:
    """Whether the processor offers a budget of visual tokens per image."""
    return _knob(processor) is not None


def _knob(processor: Any) -> str | None:
    images = getattr(processor, "image_processor", None)
    return next((name for name in BUDGETS if isinstance(getattr(images, name, None), int)), None)


@contextlib.contextmanager
def native_budget(processor: Any, ratio: float) -> Iterator[int]:
    """The processor with the budget nearest to `1 - ratio` of its usual one inside the block.

    It yields the budget, in visual tokens per image; of two as near, the smaller one.
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
