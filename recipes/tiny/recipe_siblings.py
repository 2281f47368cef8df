"""Recipes of tiny-qwen3-5 and tiny-gemma3: the lessons of `recipe_deep` in fewer steps.

They have to answer the basic families in one word, so that compression can be compared between
decoders whose layers are mostly linear or mostly local. Option letters are left to the default
model, which knows all families.
"""

from __future__ import annotations

from dataclasses import replace

from recipes.tiny.batches import Source
from recipes.tiny.recipe_deep import ASK, COUNTS, DEEP, DRAWINGS, IMAGE_CHAT, IMAGES, RATES
from recipes.tiny.stage import Stage

_HYBRID_STEPS = {
    "vision": 1200,
    "places": 250,
    "images": 600,
    "clips": 300,
    "order": 300,
    "mixture": 1000,
}
_SLIDING_STEPS = {"vision": 1100, "places": 250, "images": 550, "mixture": 900, "balance": 700}


def _shows_words(source: Source) -> bool:
    """Whether every picture of a source has words or numbers on it."""
    return source.text == 1.0 or source.scene in ("page", "numbers")


def _shortened(steps: dict[str, int], media: tuple[str, ...]) -> tuple[Stage, ...]:
    """The stages of `DEEP` that are named, with their numbers of steps, for a modality.

    Questions with options become questions that one word answers. The last stage has no words on
    pictures, which these models do not learn.
    """

    def fits(source: Source) -> bool:
        return source.media in media and source.kind not in ("letters", "forms")

    def adapted(stage: Stage) -> Stage:
        sources = [(w, replace(s, choice=0.0)) for w, s in stage.sources if fits(s)]
        if stage.name == "balance":
            sources = [(w, replace(s, text=0.0)) for w, s in sources if not _shows_words(s)]
        return replace(stage, steps=steps[stage.name], sources=tuple(sources))

    return tuple(adapted(stage) for stage in DEEP if stage.name in steps)


def _finish(steps: int, media: tuple[str, ...]) -> Stage:
    """The balancing stage with answers alone, which can start at weights without training heads."""
    (balance,) = _shortened({"balance": steps}, media)
    answers = tuple((w, s) for w, s in balance.sources if s.kind != "vision")
    return replace(balance, name="finish", sources=answers)


_ALL, _STILL = ("image", "video"), ("image",)
HYBRID = (*_shortened(_HYBRID_STEPS, _ALL), _finish(600, _ALL))
# After `finish`, counts and small objects are below 90 % still: most of the last stage is theirs.
_TALLIES = Stage(
    "tallies",
    600,
    (
        (0.40, replace(COUNTS, choice=0.0)),
        (0.45, replace(IMAGE_CHAT, choice=0.0, text=0.0, more=("small_object", "small_object"))),
        (0.05, replace(IMAGE_CHAT, choice=0.0, text=0.0, scene="hard")),
        (0.06, replace(DRAWINGS, batch=10, room=200, primers=(), **{**ASK, "choice": 0.0})),
        (0.04, replace(IMAGES, text=0.0, more=())),
    ),
    helpers=0.2,
    start=0.8,
    end=0.02,
    **RATES,
)
SLIDING = (*_shortened(_SLIDING_STEPS, _STILL), _finish(500, _STILL), _TALLIES)
