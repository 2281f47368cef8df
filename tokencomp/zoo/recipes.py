"""Training recipes of the tiny models: which batches, for how many steps, at which rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .batches import Source


@dataclass(frozen=True)
class Stage:
    """Some optimizer steps over a mixture of sources.

    ``sources`` are (weight, source); ``vision_lr`` and ``text_lr`` are the peaks of the two
    parameter groups. The rate warms up over ``warmup`` steps and, in the last stages of a recipe,
    follows one cosine from ``start`` to ``end`` (fractions of the peak).
    """

    name: str
    steps: int
    sources: tuple[tuple[float, Source], ...]
    vision_lr: float
    text_lr: float
    warmup: int = 20
    start: float = 1.0
    end: float = 1.0


# Small pictures with as many objects: more labels per second than full scenes.
_CROPS = Source("vision", "image", batch=80, size=(112, 112), objects=(2, 4))
_CLIPS = Source("vision", "video", batch=80, size=(112, 112))
_SCENES = Source("vision", "image", batch=24)
_IMAGE_PAIRS = Source("pairs", "image", batch=24, room=44, objects=(2, 4), varied=0.0)
_VIDEO_PAIRS = Source("pairs", "video", batch=8, room=44, varied=0.0)
_IMAGES = Source("questions", "image", batch=20)
_VIDEOS = Source("questions", "video", batch=8)
_RELATIONS = ("existence", "count", "position")
_EVENTS = ("order", "direction", "video_existence")
_IMAGE_FACTS = Source("facts", "image", batch=24, room=110, more=_RELATIONS)
_VIDEO_FACTS = Source("facts", "video", batch=8, room=110, more=_EVENTS)
_RATES = {"vision_lr": 5e-4, "text_lr": 1.5e-3}

STAGED = (
    Stage("vision", 600, ((0.6, _CROPS), (0.4, _CLIPS)), vision_lr=2e-3, text_lr=2e-3, end=0.2),
    Stage("pairs", 200, ((0.9, _IMAGE_PAIRS), (0.1, _SCENES)), **_RATES),
    Stage(
        "images",
        250,
        ((0.3, _IMAGE_PAIRS), (0.6, replace(_IMAGES, choice=0.1, varied=0.1)), (0.1, _SCENES)),
        **_RATES,
    ),
    Stage(
        "videos",
        250,
        (
            (0.3, _VIDEO_PAIRS),
            (0.4, replace(_VIDEOS, choice=0.1, varied=0.0)),
            (0.2, _IMAGES),
            (0.1, _SCENES),
        ),
        **_RATES,
    ),
    Stage(
        "facts",
        350,
        (
            (0.30, _IMAGE_FACTS),
            (0.30, _VIDEO_FACTS),
            (0.20, replace(_IMAGES, choice=0.1, more=_RELATIONS)),
            (0.15, replace(_VIDEOS, choice=0.1, more=_EVENTS)),
            (0.05, _SCENES),
        ),
        **_RATES,
    ),
    Stage(
        "mixture",
        1000,
        (
            (0.03, _SCENES),
            (0.45, replace(_IMAGES, dialog=0.15, more=_RELATIONS)),
            (0.52, replace(_VIDEOS, dialog=0.15, more=_EVENTS)),
        ),
        **_RATES,
        end=0.04,
    ),
)

RECIPES: dict[str, tuple[Stage, ...]] = {"tiny-qwen2-vl": STAGED}


def shorten(stages: tuple[Stage, ...], factor: float) -> tuple[Stage, ...]:
    """The same recipe with ``factor`` times the steps, at least one per stage."""
    return tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in stages)


def recipe(name: str) -> tuple[Stage, ...]:
    """Stages of the recipe of a tiny model."""
    return RECIPES.get(name, STAGED)
