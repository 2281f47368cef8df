"""Recipe of tiny-qwen3-vl-hard: tiny-qwen3-vl is trained further, on crowds and on long clips.

It starts at the finished weights of tiny-qwen3-vl. Counting in hard scenes needs many objects per
picture and all of them labelled; long clips need frames of one, two and four seconds, so that a
time reads "<126.0 seconds>".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.tiny.batches import Source
from recipes.tiny.recipe_deep import (
    ACTING,
    ASK,
    COUNT_LETTERS,
    COUNTS,
    DRAWINGS,
    IMAGE_CHAT,
    RATES,
    SPELLED_NUMBERS,
    SPELLING,
    VIDEO_CHAT,
    VIDEOS,
    WORD_OPTIONS,
)
from recipes.tiny.stage import Stage

_HARD_COUNTS = replace(COUNTS, scene="hard", room=130)
_HARD_CHAT = replace(IMAGE_CHAT, scene="hard", more=("count", "small_object"))
_HARD_SCENES = Source("vision", "image", batch=20, scene="hard")
_LONG = replace(VIDEOS, batch=6, room=300, lengths=(32, 48, 64))
_LONG_ACTS = replace(_LONG, families=("direction", "action_count"), primers=("moves", "flashes"))
_LONG_ORDER = replace(_LONG, families=("order",), primers=("when", "before", "first"))
_LONG_CHAT = replace(VIDEO_CHAT, batch=6, room=400, lengths=(32, 48, 64))
_LONGEST: dict[str, Any] = {"lengths": (48, 64, 64), "sides": (112, 168, 224, 224)}

_IMAGES: tuple[tuple[float, Source], ...] = (
    (0.42, _HARD_COUNTS),
    (0.14, _HARD_SCENES),
    (0.05, replace(COUNT_LETTERS, scene="hard")),
    (0.11, _HARD_CHAT),
    (0.07, replace(IMAGE_CHAT, more=("reading", "small_object"))),
    (0.05, COUNTS),
    (0.03, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
    (0.05, SPELLING),
    (0.01, SPELLED_NUMBERS),
    (0.01, WORD_OPTIONS),
    (0.03, VIDEO_CHAT),
    (0.02, replace(VIDEO_CHAT, scene="hard")),
    (0.01, ACTING),
)

HARD = (
    Stage("crowds", 900, _IMAGES, helpers=0.2, start=1.0, end=0.4, **RATES),
    # Reading and the counts of acts are forgotten among crowds, and come back here.
    Stage(
        "minutes",
        600,
        (
            (0.16, _LONG),
            (0.08, replace(_LONG, scene="hard")),
            (0.06, _LONG_CHAT),
            (0.04, replace(_LONG_CHAT, scene="hard")),
            (0.16, _HARD_COUNTS),
            (0.05, replace(COUNT_LETTERS, scene="hard")),
            (0.10, replace(_HARD_CHAT, more=("count", "small_object", "reading"))),
            (0.05, IMAGE_CHAT),
            (0.03, COUNTS),
            (0.02, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
            (0.09, replace(SPELLING, scene="hard")),
            (0.04, SPELLING),
            (0.02, SPELLED_NUMBERS),
            (0.01, WORD_OPTIONS),
            (0.05, VIDEO_CHAT),
            (0.03, replace(VIDEO_CHAT, scene="hard")),
            (0.04, ACTING),
        ),
        helpers=0.2,
        start=0.5,
        end=0.02,
        **RATES,
    ),
    # Motion, order and repeated acts over minutes are learnt last, and so are the largest crowds.
    Stage(
        "acts",
        550,
        (
            (0.16, _LONG_ACTS),
            (0.10, _LONG_ORDER),
            (0.06, replace(_LONG, scene="hard")),
            (0.06, _LONG_CHAT),
            (0.04, replace(_LONG_CHAT, scene="hard")),
            (0.22, _HARD_COUNTS),
            (0.03, replace(COUNT_LETTERS, scene="hard")),
            (0.08, replace(_HARD_CHAT, more=("count", "small_object", "reading"))),
            (0.06, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.05, replace(SPELLING, scene="hard")),
            (0.05, SPELLING),
            (0.02, SPELLED_NUMBERS),
            (0.05, VIDEO_CHAT),
            (0.02, ACTING),
        ),
        helpers=0.2,
        start=0.6,
        end=0.01,
        **RATES,
    ),
    # Direction, order and repeated acts of 64 frames need many more clips of that length.
    Stage(
        "motion",
        850,
        (
            (0.22, replace(_LONG_ACTS, **_LONGEST)),
            (0.14, replace(_LONG_ORDER, **_LONGEST)),
            (0.04, replace(_LONG, **_LONGEST)),
            (0.04, replace(_LONG, scene="hard")),
            (0.14, replace(_LONG_CHAT, **_LONGEST)),
            (0.06, replace(_LONG_CHAT, scene="hard", **_LONGEST)),
            (0.12, _HARD_COUNTS),
            (0.02, replace(COUNT_LETTERS, scene="hard")),
            (0.06, replace(_HARD_CHAT, more=("count", "small_object", "reading"))),
            (0.04, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.03, replace(SPELLING, scene="hard")),
            (0.03, SPELLING),
            (0.01, SPELLED_NUMBERS),
            (0.04, VIDEO_CHAT),
            (0.01, ACTING),
        ),
        helpers=0.2,
        start=0.6,
        end=0.01,
        **RATES,
    ),
    Stage(
        "directions",
        500,
        (
            (0.30, replace(_LONG_ACTS, **_LONGEST)),
            (0.07, replace(_LONG_ORDER, **_LONGEST)),
            (0.03, replace(_LONG, **_LONGEST)),
            (0.04, replace(_LONG, scene="hard")),
            (0.20, replace(_LONG_CHAT, **_LONGEST)),
            (0.06, replace(_LONG_CHAT, scene="hard", **_LONGEST)),
            (0.12, _HARD_COUNTS),
            (0.02, replace(COUNT_LETTERS, scene="hard")),
            (0.05, replace(_HARD_CHAT, more=("count", "small_object", "reading"))),
            (0.03, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.03, replace(SPELLING, scene="hard")),
            (0.02, SPELLING),
            (0.01, SPELLED_NUMBERS),
            (0.02, VIDEO_CHAT),
        ),
        helpers=0.2,
        start=0.4,
        end=0.14,
        **RATES,
    ),
    # Letters of words have been forgotten by then, and come back last.
    Stage(
        "readers",
        500,
        (
            (0.15, replace(_LONG_ACTS, **_LONGEST)),
            (0.04, replace(_LONG_ORDER, **_LONGEST)),
            (0.10, replace(_LONG_CHAT, **_LONGEST)),
            (0.02, replace(_LONG_CHAT, scene="hard", **_LONGEST)),
            (0.17, _HARD_COUNTS),
            (0.02, replace(COUNT_LETTERS, scene="hard")),
            (0.05, replace(_HARD_CHAT, more=("count", "small_object", "reading"))),
            (0.05, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.08, replace(SPELLING, scene="hard")),
            (0.05, SPELLING),
            (0.14, replace(WORD_OPTIONS, kind="questions", choice=0.6)),
            (0.04, replace(WORD_OPTIONS, kind="questions", choice=0.6, scene="hard")),
            (0.03, SPELLED_NUMBERS),
            (0.04, VIDEO_CHAT),
            (0.02, ACTING),
        ),
        helpers=0.2,
        start=0.35,
        end=0.01,
        **RATES,
    ),
)
