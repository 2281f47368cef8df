"""Recipe of tiny-qwen3-vl: every hop is taught by itself before the questions that compose it.

Places come from column and row pairs, counting from "many" pairs, time from "when" pairs on clips
of brief objects and from the clock, option letters from dense blocks without a picture, and reading
from the character of every token. Questions alone leave these families at chance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.tiny.batches import Source
from recipes.tiny.stage import Stage

_SCENES = Source("vision", "image", batch=20, objects=(4, 10), scene="crowd")
_CLIPS = Source("vision", "video", batch=14, objects=(4, 9), scene="crowd")
_PAGES = Source("vision", "image", batch=20, scene="page")
_NUMBERS = replace(_PAGES, scene="numbers")
_SEEN: tuple[tuple[float, Source], ...] = ((0.04, _SCENES), (0.04, _CLIPS), (0.04, _PAGES))

_HOPS = ("pairs", "places", "numbers", "sides", "text")
_PLAIN_FORM: dict[str, Any] = {"varied": 0.0, "choice": 0.0}
_FEW: dict[str, Any] = {"families": (), **_PLAIN_FORM}
_PLACES = Source("facts", batch=20, room=44, primers=("pairs", "places"), **_FEW)
IMAGES = Source(
    "facts", batch=16, room=110, choice=0.0, varied=0.1, text=0.4, more=("reading",), primers=_HOPS
)
# One label a picture drowns among the others, so reading gets batches of its own.
_WORDS = Source(
    "facts", batch=24, room=30, families=("reading",), primers=("text",), text=1.0, **_PLAIN_FORM
)
SPELLING = replace(_WORDS, spell=True)
_SPELLED_PAGES = Source("facts", batch=20, room=4, scene="page", spell=True, **_FEW)
DRAWINGS = replace(IMAGES, scene="plain", varied=0.8, batch=12, text=0.0, more=())
COUNTS = replace(IMAGES, batch=20, room=80, families=("count",), primers=("numbers",), text=0.0)

_BRIEF = Source(
    "facts", "video", batch=8, room=48, scene="brief", primers=("pairs", "when"), **_FEW
)
_EVENTS = ("direction", "order", "action_count", "needle", "video_existence")
_ACTS = ("pairs", "moves", "when", "flashes")
VIDEOS = Source(
    "facts", "video", batch=8, room=110, choice=0.0, varied=0.0, families=_EVENTS, primers=_ACTS
)
_ORDER = replace(_BRIEF, room=110, families=("order",), primers=("when", "before", "first"))

ACTING = replace(
    _BRIEF,
    room=130,
    scene="acts",
    families=("direction", "action_count"),
    primers=("moves", "flashes", "shown"),
)

_OPTIONS = Source("letters", batch=16, room=330)
_FORMS = Source("forms", batch=16, room=330)
_IMAGE_LETTERS = replace(IMAGES, choice=0.85, primers=(), batch=14, room=200, text=0.2)
_VIDEO_LETTERS = replace(VIDEOS, choice=0.85, primers=(), room=230)

_ACT_LETTERS = replace(ACTING, choice=0.85, primers=("moves",), room=250)
_WORD_LETTERS = replace(SPELLING, choice=0.85, primers=(), room=110, batch=16)
WORD_OPTIONS = replace(_WORD_LETTERS, choice=0.9, room=260, repeat=True)
COUNT_LETTERS = replace(COUNTS, choice=0.85, primers=(), room=260, batch=16, repeat=True)
SPELLED_NUMBERS = replace(_SPELLED_PAGES, scene="numbers")

ASK: dict[str, Any] = {"kind": "questions", "choice": 0.3, "dialog": 0.1, "varied": 0.2}
IMAGE_CHAT = replace(IMAGES, batch=14, room=230, primers=(), text=0.3, **ASK)
VIDEO_CHAT = replace(VIDEOS, batch=7, room=260, primers=(), **ASK)
RATES: dict[str, Any] = {"vision_lr": 8e-4, "text_lr": 1.5e-3}

DEEP = (
    Stage(
        "vision",
        1500,
        ((0.38, _SCENES), (0.36, _CLIPS), (0.26, _PAGES)),
        vision_lr=2e-3,
        text_lr=2e-3,
        end=0.2,
    ),
    Stage("places", 250, ((0.88, _PLACES), *_SEEN), **RATES),
    # The tower learns characters and the shapes of moving objects last. Reading and the order of
    # events can only be learnt after them.
    Stage(
        "pages",
        1500,
        ((0.54, _PAGES), (0.30, _CLIPS), (0.08, _SCENES), (0.08, _PLACES)),
        vision_lr=2e-3,
        text_lr=1.5e-3,
        end=0.3,
    ),
    Stage("images", 500, ((0.68, IMAGES), (0.20, DRAWINGS), *_SEEN), **RATES),
    Stage(
        "clips",
        300,
        ((0.55, _BRIEF), (0.18, VIDEOS), (0.15, IMAGES), *_SEEN),
        helpers=0.5,
        **RATES,
    ),
    Stage("words", 200, ((0.58, SPELLING), (0.15, VIDEOS), (0.15, IMAGES), *_SEEN), **RATES),
    # The decoder reads once it can name the word that one visual token shows.
    Stage(
        "spelling",
        300,
        ((0.28, _SPELLED_PAGES), (0.40, SPELLING), (0.12, VIDEOS), (0.08, IMAGES), *_SEEN),
        **RATES,
    ),
    Stage(
        "order",
        400,
        ((0.33, _ORDER), (0.33, VIDEOS), (0.14, IMAGES), (0.08, SPELLING), *_SEEN),
        helpers=0.5,
        **RATES,
    ),
    Stage(
        "letters",
        600,
        ((0.76, _OPTIONS), (0.10, IMAGES), (0.10, VIDEOS), (0.04, SPELLING)),
        helpers=0.5,
        vision_lr=1e-4,
        text_lr=1.5e-3,
    ),
    Stage(
        "forms",
        200,
        ((0.55, _FORMS), (0.10, _OPTIONS), (0.15, _IMAGE_LETTERS), (0.10, IMAGES), (0.1, VIDEOS)),
        helpers=0.3,
        vision_lr=2e-4,
        text_lr=1.5e-3,
    ),
    Stage(
        "choices",
        300,
        (
            (0.45, _IMAGE_LETTERS),
            (0.25, _VIDEO_LETTERS),
            (0.10, _FORMS),
            (0.10, IMAGES),
            (0.10, VIDEOS),
        ),
        helpers=0.3,
        vision_lr=4e-4,
        text_lr=1.5e-3,
    ),
    Stage(
        "mixture",
        1200,
        (
            (0.20, IMAGE_CHAT),
            (0.04, replace(IMAGE_CHAT, scene="hard")),
            (0.08, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
            (0.15, COUNTS),
            (0.05, IMAGES),
            (0.05, SPELLING),
            (0.05, _SPELLED_PAGES),
            (0.19, VIDEO_CHAT),
            (0.05, replace(VIDEO_CHAT, scene="hard")),
            (0.05, VIDEOS),
            (0.04, _ORDER),
            (0.01, _FORMS),
            (0.02, _PAGES),
            (0.02, _CLIPS),
        ),
        helpers=0.2,
        end=0.04,
        **RATES,
    ),
    # Numbers, repeated flashes and the letters of both are where the stages so far leave most room.
    Stage(
        "numbers",
        600,
        (
            (0.45, _PAGES),
            (0.16, _SPELLED_PAGES),
            (0.15, SPELLING),
            (0.08, _CLIPS),
            (0.06, IMAGES),
            (0.06, VIDEOS),
            (0.04, _SCENES),
        ),
        vision_lr=2e-3,
        text_lr=1.5e-3,
        end=0.4,
    ),
    Stage(
        "acts",
        600,
        ((0.45, ACTING), (0.20, SPELLING), (0.10, IMAGES), (0.08, VIDEOS), *_SEEN),
        helpers=0.5,
        **RATES,
    ),
    Stage(
        "answers",
        300,
        (
            (0.30, _ACT_LETTERS),
            (0.30, _WORD_LETTERS),
            (0.10, ACTING),
            (0.08, _SPELLED_PAGES),
            (0.05, _FORMS),
            (0.10, _IMAGE_LETTERS),
            (0.05, _PAGES),
        ),
        helpers=0.3,
        **RATES,
    ),
    # One question a picture leaves the letters of words at chance; five with other options do not.
    Stage(
        "options",
        300,
        (
            (0.60, WORD_OPTIONS),
            (0.10, SPELLING),
            (0.10, replace(_ACT_LETTERS, repeat=True)),
            (0.08, _IMAGE_LETTERS),
            (0.05, _FORMS),
            (0.07, _PAGES),
        ),
        helpers=0.3,
        **RATES,
    ),
    Stage(
        "polish",
        1200,
        (
            (0.16, IMAGE_CHAT),
            (0.04, replace(IMAGE_CHAT, scene="hard")),
            (0.07, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
            (0.12, COUNTS),
            (0.06, SPELLING),
            (0.05, _SPELLED_PAGES),
            (0.07, replace(WORD_OPTIONS, kind="questions", choice=0.5)),
            (0.13, VIDEO_CHAT),
            (0.05, replace(VIDEO_CHAT, scene="hard")),
            (0.07, ACTING),
            (0.07, replace(_ACT_LETTERS, kind="questions", choice=0.5)),
            (0.02, _ORDER),
            (0.01, _FORMS),
            (0.04, _PAGES),
            (0.08, _NUMBERS),
            (0.01, _CLIPS),
        ),
        helpers=0.2,
        end=0.03,
        **RATES,
    ),
    # Counting and small objects are forgotten first and come back last.
    Stage(
        "balance",
        600,
        (
            (0.26, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.03, replace(IMAGE_CHAT, scene="hard")),
            (0.05, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
            (0.24, COUNTS),
            (0.05, SPELLING),
            (0.05, replace(WORD_OPTIONS, kind="questions", choice=0.5)),
            (0.10, VIDEO_CHAT),
            (0.02, replace(VIDEO_CHAT, scene="hard")),
            (0.03, ACTING),
            (0.03, replace(_ACT_LETTERS, kind="questions", choice=0.5)),
            (0.02, _ORDER),
            (0.03, _SCENES),
            (0.02, _PAGES),
            (0.06, _NUMBERS),
            (0.01, _CLIPS),
        ),
        helpers=0.2,
        start=0.6,
        end=0.02,
        **RATES,
    ),
    # Numbers among options: two digits have to be found together. Both stages can start at
    # published weights, because nothing in them needs the heads on visual tokens.
    Stage(
        "figures",
        500,
        (
            (0.30, _OPTIONS),
            (0.15, _FORMS),
            (0.30, WORD_OPTIONS),
            (0.06, _SPELLED_PAGES),
            (0.05, COUNTS),
            (0.07, IMAGE_CHAT),
            (0.07, VIDEO_CHAT),
        ),
        helpers=0.2,
        end=0.5,
        vision_lr=3e-4,
        text_lr=1.5e-3,
    ),
    Stage(
        "settle",
        700,
        (
            (0.23, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.03, replace(IMAGE_CHAT, scene="hard")),
            (0.05, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
            (0.19, COUNTS),
            (0.07, SPELLING),
            (0.04, _SPELLED_PAGES),
            (0.14, replace(WORD_OPTIONS, kind="questions", choice=0.6)),
            (0.10, VIDEO_CHAT),
            (0.02, replace(VIDEO_CHAT, scene="hard")),
            (0.03, ACTING),
            (0.03, replace(_ACT_LETTERS, kind="questions", choice=0.5)),
            (0.02, _ORDER),
            (0.05, _FORMS),
        ),
        helpers=0.2,
        start=0.6,
        end=0.02,
        **RATES,
    ),
    # Letters of counts stay behind the counts themselves, and numbers on pictures behind words.
    Stage(
        "tallies",
        800,
        (
            (0.17, replace(IMAGE_CHAT, more=("reading", "small_object"))),
            (0.03, replace(IMAGE_CHAT, scene="hard")),
            (0.05, replace(DRAWINGS, batch=10, room=200, primers=(), **ASK)),
            (0.13, COUNTS),
            (0.18, COUNT_LETTERS),
            (0.11, SPELLING),
            (0.08, SPELLED_NUMBERS),
            (0.06, replace(WORD_OPTIONS, kind="questions", choice=0.6)),
            (0.09, VIDEO_CHAT),
            (0.02, replace(VIDEO_CHAT, scene="hard")),
            (0.03, ACTING),
            (0.02, replace(_ACT_LETTERS, kind="questions", choice=0.5)),
            (0.02, _ORDER),
            (0.01, _FORMS),
        ),
        helpers=0.2,
        start=0.6,
        end=0.02,
        **RATES,
    ),
)
