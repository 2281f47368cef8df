"""One stage of a training recipe."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.zoo.batches import Source


@dataclass(frozen=True)
class Stage:
    """Some optimizer steps over a mixture of sources.

    ``sources`` are (weight, source); ``vision_lr`` and ``text_lr`` are the peaks of the two
    parameter groups. The rate warms up over ``warmup`` steps and, in the last stages of a recipe,
    follows one cosine from ``start`` to ``end`` (fractions of the peak). ``helpers`` is the weight
    of the losses on an early layer: the time of a frame and the letter of an option.
    """

    name: str
    steps: int
    sources: tuple[tuple[float, Source], ...]
    vision_lr: float
    text_lr: float
    warmup: int = 20
    start: float = 1.0
    end: float = 1.0
    helpers: float = 0.0
