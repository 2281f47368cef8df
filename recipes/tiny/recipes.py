"""Training recipes of the tiny models: which batches, for how many steps, at which rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.tiny.batches import Source
from recipes.tiny.recipe_deep import DEEP
from recipes.tiny.recipe_hard import HARD
from recipes.tiny.recipe_siblings import HYBRID, SLIDING
from recipes.tiny.stage import Stage

__all__ = ["RECIPES", "WARM_STARTS", "Stage", "shorten"]


# Small pictures with as many objects: more labels per second than full scenes.
_CROPS = Source("vision", "image", batch=80, size=(112, 112), objects=(2, 4))
_CLIPS = Source("vision", "video", batch=80, size=(112, 112), objects=(1, 4), scene="crowd")
_SCENES = Source("vision", "image", batch=24)
_PAIRS: dict[str, Any] = {"primers": ("pairs",), "families": (), "room": 44, "varied": 0.0}
_IMAGE_PAIRS = Source("facts", "image", batch=24, objects=(2, 4), **_PAIRS)
_VIDEO_PAIRS = Source("facts", "video", batch=8, **_PAIRS)
_IMAGES = Source("questions", "image", batch=20)
_VIDEOS = Source("questions", "video", batch=8)
_RELATIONS = ("existence", "count", "position")
_EVENTS = ("order", "direction", "video_existence")
_IMAGE_FACTS = Source("facts", "image", batch=20, room=200, more=_RELATIONS)
_VIDEO_FACTS = Source("facts", "video", batch=8, room=230, more=_EVENTS)
_RATES: dict[str, Any] = {"vision_lr": 5e-4, "text_lr": 1.5e-3}

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
        "questions",
        300,
        (
            (0.05, _SCENES),
            (0.40, replace(_IMAGES, dialog=0.15)),
            (0.55, replace(_VIDEOS, dialog=0.15)),
        ),
        **_RATES,
        end=0.7,
    ),
    Stage(
        "facts",
        400,
        (
            (0.40, _IMAGE_FACTS),
            (0.45, _VIDEO_FACTS),
            (0.05, replace(_IMAGES, choice=0.5)),
            (0.05, replace(_VIDEOS, choice=0.5)),
            (0.05, _SCENES),
        ),
        **_RATES,
    ),
    Stage(
        "mixture",
        700,
        (
            (0.03, _SCENES),
            (0.45, replace(_IMAGES, dialog=0.15, more=_RELATIONS)),
            (0.52, replace(_VIDEOS, dialog=0.15, more=_EVENTS)),
        ),
        **_RATES,
        end=0.04,
    ),
)

_TILES = Source("vision", "image", batch=32, size=(192, 192), objects=(3, 7))
_FEW: dict[str, Any] = {"batch": 14, "varied": 0.1}
_SHORT: dict[str, Any] = {"batch": 6, "varied": 0.1}

# The decoder starts from tiny-qwen2-vl's, as the published models start from a trained one.
ALIGNED = (
    Stage("vision", 700, ((1.0, _TILES),), vision_lr=2e-3, text_lr=2e-3, end=0.2),
    Stage(
        "pairs",
        300,
        ((0.75, replace(_IMAGE_PAIRS, batch=16)), (0.2, _VIDEO_PAIRS), (0.05, _TILES)),
        **_RATES,
    ),
    Stage(
        "facts",
        200,
        (
            (0.20, replace(_IMAGE_PAIRS, batch=16)),
            (0.30, replace(_IMAGE_FACTS, **_FEW)),
            (0.40, replace(_VIDEO_FACTS, **_SHORT)),
            (0.05, replace(_IMAGES, choice=0.5, **_FEW)),
            (0.05, replace(_VIDEOS, choice=0.5, **_SHORT)),
        ),
        **_RATES,
    ),
    Stage(
        "mixture",
        1500,
        (
            (0.48, replace(_IMAGES, dialog=0.15, more=_RELATIONS, **_FEW)),
            (0.52, replace(_VIDEOS, dialog=0.15, more=_EVENTS, **_SHORT)),
        ),
        **_RATES,
        end=0.04,
    ),
)

# Tower and decoder start from tiny-llava-onevision's; the projector alone is new.
_BRIEF: dict[str, Any] = {"batch": 6, "varied": 0.15}

PROJECTED = (
    Stage("vision", 120, ((1.0, _SCENES),), vision_lr=1e-3, text_lr=1e-3, end=0.3),
    Stage(
        "pairs",
        250,
        ((0.7, _IMAGE_PAIRS), (0.25, replace(_VIDEO_PAIRS, batch=6)), (0.05, _SCENES)),
        **_RATES,
    ),
    Stage(
        "facts",
        150,
        (
            (0.40, _IMAGE_FACTS),
            (0.45, replace(_VIDEO_FACTS, **_BRIEF)),
            (0.05, replace(_IMAGES, choice=0.5)),
            (0.05, replace(_VIDEOS, choice=0.5, **_BRIEF)),
            (0.05, _SCENES),
        ),
        **_RATES,
    ),
    Stage(
        "mixture",
        1000,
        (
            (0.48, replace(_IMAGES, dialog=0.15, more=_RELATIONS)),
            (0.52, replace(_VIDEOS, dialog=0.15, more=_EVENTS, **_BRIEF)),
        ),
        **_RATES,
        end=0.04,
    ),
)

RECIPES: dict[str, tuple[Stage, ...]] = {
    "tiny-qwen2-vl": STAGED,
    "tiny-qwen3-vl": DEEP,
    "tiny-qwen3-vl-hard": HARD,
    "tiny-qwen3-5": HYBRID,
    "tiny-gemma3": SLIDING,
    "tiny-llava-onevision": ALIGNED,
    "tiny-vila": PROJECTED,
}
WARM_STARTS = {
    "tiny-llava-onevision": "tiny-qwen2-vl",
    "tiny-vila": "tiny-llava-onevision",
    "tiny-qwen3-vl-hard": "tiny-qwen3-vl",
}


def shorten(stages: tuple[Stage, ...], factor: float) -> tuple[Stage, ...]:
    """The same recipe with ``factor`` times the steps, at least one per stage."""
    return tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in stages)
