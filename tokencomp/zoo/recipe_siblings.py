"""Recipes of tiny-qwen3-5 and tiny-gemma3: the lessons of `recipe_deep` in fewer steps.

They have to answer the basic families, so that compression can be compared between decoders whose
layers are mostly linear or mostly local; the default model is the one that knows all families.
"""

from __future__ import annotations

from dataclasses import replace

from tokencomp.zoo.recipe_deep import DEEP
from tokencomp.zoo.stage import Stage

_HYBRID_STEPS = {
    "vision": 1200,
    "places": 250,
    "images": 600,
    "clips": 300,
    "order": 300,
    "letters": 450,
    "forms": 150,
    "choices": 250,
    "mixture": 1400,
}
_SLIDING_STEPS = {
    "vision": 1400,
    "places": 300,
    "images": 900,
    "letters": 500,
    "forms": 150,
    "choices": 300,
    "mixture": 1500,
}


def _shortened(steps: dict[str, int]) -> tuple[Stage, ...]:
    """The stages of `DEEP` that are named, with their numbers of steps."""
    return tuple(replace(stage, steps=steps[stage.name]) for stage in DEEP if stage.name in steps)


def _stills(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The same stages without videos, for a model whose processor takes images alone."""
    return tuple(
        replace(stage, sources=tuple(s for s in stage.sources if s[1].media == "image"))
        for stage in stages
    )


HYBRID = _shortened(_HYBRID_STEPS)
SLIDING = _stills(_shortened(_SLIDING_STEPS))
