"""Training batches of long answers: a pure function of (seed, stage, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Any

import numpy as np

from recipes.long.cells import token_labels
from recipes.packing import Packer, stacked
from recipes.tiny.batches import codec_noise, frames_of, spell
from recipes.tiny.families.qwen3_vl import TinyQwen3VL
from recipes.tiny.labels import place
from tokencomp.training.steps import Phase
from tokencomp.zoo.shapesqa.facts import PLACES, Fact, write
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.long_scenes import (
    CLIP_SIDE,
    FRAMES,
    QUESTIONS,
    SIDE,
    counted,
    counted_words,
    described,
    draw,
    picture,
    place_number,
)
from tokencomp.zoo.shapesqa.scenes import Scene

COUNTS = 4  # questions that count, about one picture
PRIMERS = 10  # pairs about one picture or clip
RATE = 2.0  # frames a second
Segment = tuple[list[int], list[int]]


@dataclass(frozen=True)
class LongStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    shares : tuple of (str, float)
        Shares of the batches of "picture" (described and counted), "read", "follow", "compare".
    most : int
        Largest number of objects in a picture; see `draw`.
    primers : float
        Share of the pictures and clips with `PRIMERS` pairs of a key and its value.
    describe : float
        Share of pictures that are described; all are counted.
    batch : int
        Pictures, or clips of ten frames, or twice as many as pairs of pictures.
    helpers : float
        Weight of the loss on what visual tokens show.
    sides : tuple of int
        Sides of pictures, in pixels.
    """

    shares: tuple[tuple[str, float], ...]
    vision_lr: float
    text_lr: float
    most: int = 12
    primers: float = 0.5
    describe: float = 1.0
    batch: int = 12
    helpers: float = 0.0
    sides: tuple[int, ...] = SIDE


class Pictures(TinyQwen3VL):
    """Tiny Qwen3-VL with one or several pictures before the question, and clips from files."""

    first_frame = 0.5

    def expand(self, ids, kind, shape, encode, fps):
        """One run of placeholders per picture, each with marks around it."""
        count, height, width = shape
        if kind == "video" or count == 1:
            return super().expand(ids, kind, shape, encode, fps)
        *before, start, pad, end = ids
        _, rows, columns = self.grid(kind, (1, height, width))
        tokens, positions = [*before], [np.tile(np.arange(len(before)), (3, 1))]
        at = len(before)
        for _ in range(count):
            tokens += [start, *[pad] * (rows * columns), end]
            grid = np.indices((1, rows, columns)).reshape(3, -1) + at + 1
            mark = np.full((3, 1), at)
            positions += [mark, grid, mark + max(rows, columns) + 1]
            at += max(rows, columns) + 2
        return np.asarray(tokens, np.int64), np.concatenate(positions, 1).astype(np.int64)


class LongBatches:
    """Builds the batch of one step. Picklable parts only, so it can live in a worker."""

    def __init__(self, packer: Packer, seed: int, stages: Sequence[LongStage]) -> None:
        self.packer, self.seed, self.stages = packer, seed, stages

    def make(self, number: int, step: int) -> dict[str, Any]:
        rng = stream("train", "long batches", self.seed, number, step)
        stage = self.stages[number]
        names, weights = zip(*stage.shares, strict=True)
        kind = str(rng.choice(names, p=np.asarray(weights) / sum(weights)))
        shape, count = _shape(kind, rng, stage)
        cell = self._cell(shape)
        frames, rows, labels, pages, cells = [], [], [], [], []
        for _ in range(count):
            scenes, segments = self.segments(kind, rng, shape, stage)
            frames.append(_pixels(scenes, rng))
            rows.append([segment for _, segment in segments])
            labels.append([*(name for name, _ in segments), "spelling"])
            pages.append(scenes[0])
            cells.append(token_labels(scenes, cell))
        packed = self._packed(kind, shape, rows)
        if kind == "read":
            for row, page, named in zip(packed, pages, labels, strict=True):
                spell(self.packer, cell, row, page, "image", len(named) - 1)
        return {
            **stacked(packed),
            "media": "video" if kind == "follow" else "image",
            "frames": np.stack(frames),
            "cells": np.stack(cells),
            "names": labels,
        }

    def _cell(self, shape: tuple[int, int, int]) -> int:
        """Side in pixels of the square that a visual token covers; pictures are squares."""
        _, height, width = shape
        return width // isqrt(self.packer.family.tokens_per("image", (1, height, width)))

    def _packed(self, kind: str, shape: tuple[int, int, int], rows: list[list[Segment]]) -> list:
        media = "video" if kind == "follow" else "image"
        if kind == "compare":
            shape = 2, *shape[1:]
        room = max(sum(len(ids) for ids, _ in row) for row in rows)
        length = len(self.packer.prefix(media, shape, RATE)[0]) + room
        return [self.packer.pack(media, shape, row, length, fps=RATE) for row in rows]

    def segments(
        self, kind: str, rng: np.random.Generator, shape: tuple[int, int, int], stage: LongStage
    ) -> tuple[tuple[Scene, ...], list[tuple[str, Segment]]]:
        """Scenes, and named questions and primers about them in random order."""
        primers: list[tuple[str, str]] = []
        media = "video" if kind == "follow" else "image"

        def asked(family: str, question: str, facts: Sequence[Fact]) -> tuple[str, Segment]:
            return family, self.packer.segment(media, question, write(family, facts))

        if kind == "picture":
            scenes: tuple[Scene, ...] = (picture(rng, shape, stage.most),)
            facts = described(scenes[0])
            whole = asked("describe", QUESTIONS["describe"], facts)
            out = [whole] if rng.random() < stage.describe else []
            words = counted_words(scenes[0])
            for word in sorted({str(rng.choice(words)) for _ in range(COUNTS)}):
                out.append(asked("count", *counted(scenes[0], word)))
            primers = [(f" {f.key}:", f" a {f.value}") for f in facts]  # one hop each, as all are
        else:
            scenes, question, facts = draw(kind, rng, shape, stage.most)
            out = [asked(kind, question, facts)]
            primers = _PRIMERS[kind](scenes, facts)
        if primers and rng.random() < stage.primers:
            chosen = rng.permutation(len(primers))[:PRIMERS]
            out += [("primer-" + kind, self.packer.pair(*primers[i])) for i in chosen]
        return scenes, [out[i] for i in rng.permutation(len(out))]


def _seconds(_: tuple[Scene, ...], facts: Sequence[Fact]) -> list[tuple[str, str]]:
    """What happens in a second."""
    return [(f" {f.key} s,", f" {f.value}") for f in facts]


def _next_words(scenes: tuple[Scene, ...], facts: Sequence[Fact]) -> list[tuple[str, str]]:
    """The word after a word; column and row of a word in a grid of 8×8 over the page."""
    out = [(f" after {a.value}", f" {b.value}") for a, b in pairwise(facts)]
    for text in scenes[0].texts:
        left, top, right, bottom = text.box
        out.append((f" {text.text} column", str(place((left + right) / 2, scenes[0].width))))
        out.append((f" {text.text} row", str(place((top + bottom) / 2, scenes[0].height))))
    return out


def _both(scenes: tuple[Scene, ...], _: Sequence[Fact]) -> list[tuple[str, str]]:
    """What stands in a place before and after; a place that is empty once is one of them."""
    at = [
        {
            place_number(t.center(), scene.width, scene.height): f" {t.color} {t.shape}"
            for t in scene.things
        }
        for scene in scenes
    ]
    return [
        (f" {when} {PLACES[number]}:", shown.get(number, " no"))
        for number in sorted({*at[0], *at[1]})
        for when, shown in zip(("before", "after"), at, strict=True)
    ]


_PRIMERS = {"read": _next_words, "follow": _seconds, "compare": _both}


def _shape(
    kind: str, rng: np.random.Generator, stage: LongStage
) -> tuple[tuple[int, int, int], int]:
    """(frames, height, width) of one batch, and how many clips, pictures or pairs it has."""
    batch = stage.batch
    if kind == "follow":
        frames = int(rng.choice(FRAMES))
        return (frames, CLIP_SIDE, CLIP_SIDE), min(batch, batch * 10 // frames)
    side = stage.sides[-1] if kind == "read" else int(rng.choice(stage.sides))
    return (1, side, side), batch // 2 if kind == "compare" else batch


def _pixels(scenes: tuple[Scene, ...], rng: np.random.Generator) -> np.ndarray:
    """uint8 (pictures or frames, height, width, 3); each picture has its own file noise."""
    shown = []
    for scene in scenes:
        phase = 0.0 if scene.frames == 1 else 0.25 + float(rng.integers(3)) / 4
        times = [k + phase for k in range(scene.frames)]
        shown.append(codec_noise(frames_of(scene, times), rng))
    return np.concatenate(shown)
