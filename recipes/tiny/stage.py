"""One stage of a training recipe."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.tiny.batches import Source
from tokencomp.training.steps import Phase


@dataclass(frozen=True)
class Stage(Phase):
    """Some optimizer steps over a mixture of sources.

    ``sources`` are (weight, source); ``vision_lr`` and ``text_lr`` are the peaks of the two
    parameter groups. In the last stages of a recipe one cosine goes from ``start`` to ``end``.
    ``helpers`` is the weight of the losses on an early layer: the time of a frame and the letter of
    an option.
    """

    sources: tuple[tuple[float, Source], ...]
    vision_lr: float
    text_lr: float
    helpers: float = 0.0
