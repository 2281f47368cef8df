"""ShapesQA: a procedural visual question answering benchmark for images and videos.

Every item is a pure function of (split, family, index): no file, no download. The three splits draw
from disjoint seed streams. "test" is for reporting only, nothing may be chosen on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokencomp.errors import unknown_name
from tokencomp.inputs.video import Video
from tokencomp.inputs.video.frames import frame_indices
from tokencomp.zoo.shapesqa.difficulty import sample_scene
from tokencomp.zoo.shapesqa.prompt_forms import letter
from tokencomp.zoo.shapesqa.questions import FAMILIES, IMAGE_FAMILIES, VIDEO_FAMILIES, Question, ask
from tokencomp.zoo.shapesqa.scenes import Scene

SPLIT_SEEDS = {"train": 11_000_003, "validation": 22_000_003, "test": 33_000_001}
FRAMES = 8


@dataclass(frozen=True)
class Evidence:
    """Where the answer stands. For pictures and analysis; no reducer may read it.

    ``boxes`` are (frame, left, top, right, bottom) in pixels, ``frames`` the logical frames in
    which a relevant object is visible.
    """

    boxes: tuple[tuple[int, int, int, int, int], ...]
    frames: tuple[int, ...]


class QueryFields:
    """What an item says of its question, `query`."""

    query: Question

    @property
    def family(self) -> str:
        return self.query.family

    @property
    def question(self) -> str:
        return self.query.text

    @property
    def answer(self) -> str:
        """Free-form answer, one word."""
        return self.query.answer

    @property
    def options(self) -> tuple[str, ...]:
        return self.query.options


@dataclass(frozen=True)
class Item(QueryFields):
    """One question with its scene; pixels are rendered on demand."""

    id: str
    scene: Scene
    query: Question
    media: Path | None = None

    @property
    def kind(self) -> str:
        """ "image" or "video"."""
        return self.scene.kind

    @property
    def letter(self) -> str:
        """Letter of the right option in the multiple-choice form."""
        return letter(self.query)

    @cached_property
    def evidence(self) -> Evidence:
        things = [self.scene.things[i] for i in self.query.things]
        boxes = tuple(
            (frame, *thing.box(frame))
            for frame in range(self.scene.frames)
            for thing in things
            if thing.visible_at(frame)
        )
        return Evidence(boxes, tuple(sorted({box[0] for box in boxes})))

    def pixels(self) -> np.ndarray:
        """Lossless frames, uint8 (frames, height, width, 3); files hold the compressed ones."""
        from tokencomp.zoo.shapesqa.render import render

        return render(self.scene)

    def image(self) -> Image.Image:
        """The picture of an image item, as the HF processors take it."""
        return Image.fromarray(self.pixels()[0])

    def video(self) -> Video:
        """The frames of a video item, at the times that they have in its file."""
        from tokencomp.zoo.shapesqa.render import FPS, HOLD

        frames = [Image.fromarray(frame) for frame in self.pixels()]
        total = HOLD * len(frames)
        return Video(frames, FPS, frame_indices(total, len(frames)), total)


def stream(split: str, *key: int | str) -> np.random.Generator:
    """Random generator of one item; streams of different splits never coincide."""
    if split not in SPLIT_SEEDS:
        raise unknown_name("split", split, SPLIT_SEEDS)
    words = [k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key]
    return np.random.default_rng([SPLIT_SEEDS[split], *words])


def item(
    split: str,
    family: str,
    index: int,
    size: tuple[int, int] | None = None,
    frames: int = FRAMES,
    difficulty: str = "usual",
) -> Item:
    """Item ``index`` of one question family.

    Parameters
    ----------
    split : {"train", "validation", "test"}
    family : str
        One of :data:`~tokencomp.zoo.shapesqa.questions.FAMILIES`.
    index : int
        Any non-negative number; the same arguments always give the same item.
    size : (int, int) or None
        Width and height in pixels; None is 224×224, and random for plain drawings.
    frames : int
        Logical frames of a video; even, at least 8. Image families ignore it.
    difficulty : {"plain", "usual", "hard"}
        See :mod:`~tokencomp.zoo.shapesqa.difficulty`. Each has seed streams of its own.

    Raises
    ------
    UnknownNameError
        For an unknown split, family or difficulty.
    """
    if family not in FAMILIES:
        raise unknown_name("question family", family, FAMILIES)
    stem = () if difficulty == "usual" else (difficulty,)
    for attempt in range(1000):
        rng = stream(split, *stem, family, index, attempt)
        scene = sample_scene(rng, family, size, frames, difficulty)
        query = ask(scene, family, rng)
        if query is not None:
            return Item("-".join((split, *stem, family, f"{index:05d}")), scene, query)
    raise RuntimeError(f"No scene of {size} px and {frames} frames allows a {family!r} question.")


def items(
    split: str,
    per_family: int,
    families: tuple[str, ...] = IMAGE_FAMILIES + VIDEO_FAMILIES,
    start: int = 0,
    **scene: Any,
) -> Iterator[Item]:
    """``per_family`` items of each family, family by family."""
    for family in families:
        for index in range(start, start + per_family):
            yield item(split, family, index, **scene)
