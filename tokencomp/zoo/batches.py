"""Training batches of ShapesQA: a pure function of (seed, stage, step)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tokencomp.shapesqa.items import stream
from tokencomp.shapesqa.questions import (
    FREE_FORM_SUFFIX,
    Question,
    ask,
    families,
    letter,
    letters_prompt,
    mlvu_prompt,
    mvbench_prompt,
)
from tokencomp.shapesqa.render import owner_map, render
from tokencomp.shapesqa.scenes import COLORS, SHAPES, Scene, clip_scene, image_scene, video_scene
from tokencomp.zoo.packing import Packer

IMAGE_SIZES = ((224, 224), (280, 224), (196, 252), (280, 280), (168, 168))
VIDEO_FORMS = ((224, 224, 8), (224, 224, 16), (168, 224, 8), (224, 224, 12))
MIN_COVER = 0.077  # share of a cell that an object must cover for its label to count


@dataclass(frozen=True)
class Source:
    """What one batch holds.

    `kind` is "vision" (per-token labels), "pairs" (one-hop pairs), "facts" (question and answer
    without the chat around them, one hop shorter) or "questions"; `more` names families that occur
    twice as often; `media` is "image" or "video"; `choice` the share of multiple-choice questions;
    `varied` the share of batches of another size or frame count than 224×224 × 8; `dialog` the
    share of batches that are chats of several turns; `size` is for "vision" alone.
    """

    kind: str
    media: str = "image"
    batch: int = 32
    room: int = 230
    objects: tuple[int, int] = (2, 5)
    choice: float = 0.25
    varied: float = 0.2
    dialog: float = 0.0
    size: tuple[int, int] = (224, 224)
    more: tuple[str, ...] = ()


def _codec_noise(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What files do to pixels: JPEG with 4:2:0 chroma, on half of the samples."""
    if rng.random() < 0.5:
        return frames
    t, h, w, _ = frames.shape
    buffer = io.BytesIO()
    quality = int(rng.integers(70, 96))
    Image.fromarray(frames.reshape(t * h, w, 3)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)).reshape(t, h, w, 3)


def _question_text(question: Question, choice: float, rng: np.random.Generator) -> tuple[str, str]:
    """Prompt and expected text in one of the forms users and benchmarks use."""
    if rng.random() < choice:
        forms = (mvbench_prompt, mlvu_prompt, letters_prompt)
        return forms[int(rng.integers(3))](question), letter(question)
    return question.text + (FREE_FORM_SUFFIX if rng.random() < 0.2 else ""), question.answer


def _pairs(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """All unambiguous one-hop pairs: shape to colour and colour to shape."""
    out = []
    for attribute, other in (("shape", "color"), ("color", "shape")):
        words = [getattr(thing, attribute) for thing in scene.things]
        for thing in scene.things:
            word = getattr(thing, attribute)
            if words.count(word) == 1:
                out.append((f" {word}", getattr(thing, other)))
    return [out[i] for i in rng.permutation(len(out))]


def _cells(pixels: np.ndarray, cell: int) -> np.ndarray:
    """(height, width) cut into cells: (rows, columns, cell, cell)."""
    rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell
    cut = pixels[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
    return cut.transpose(0, 2, 1, 3)


def cell_labels(scene: Scene, time: float, cell: int) -> dict[str, np.ndarray]:
    """What each token's cell shows. A cell belongs to the object that covers most of it.

    Returns
    -------
    dict
        `words` int64 (rows, columns, 2): colour and shape, 0 = background, -100 = too little to
        tell; `mask` float32 (rows, columns, 49): object or not on a 7×7 lattice; `box` float32
        (rows, columns, 4): centre of the object relative to the cell's and its size, in cells, then
        the share of the object that lies in this cell relative to its best cell.
    """
    cells = _cells(owner_map(scene, time), cell)
    rows, columns = cells.shape[:2]
    step = cell // 7
    edge = (cell - 7 * step) // 2
    inner = cells[..., edge : edge + 7 * step, edge : edge + 7 * step]
    lattice = inner.reshape(rows, columns, 7, step, 7, step) >= 0
    mask = lattice.mean((3, 5)).reshape(rows, columns, 49).astype(np.float32)
    words = np.zeros((rows, columns, 2), np.int64)
    box = np.zeros((rows, columns, 4), np.float32)
    if not scene.things:
        return {"words": words, "mask": mask, "box": box}
    area = np.stack([(cells == i).sum((2, 3)) for i in range(len(scene.things))], -1)
    best, most = area.argmax(-1), area.max(-1)
    words[most > 0] = -100
    for row, column in zip(*np.nonzero(most > MIN_COVER * cell**2 - 1), strict=True):
        index = best[row, column]
        thing = scene.things[index]
        words[row, column] = COLORS.index(thing.color) + 1, SHAPES.index(thing.shape) + 1
        x, y = thing.center(time)
        share = most[row, column] / area[..., index].max()
        box[row, column] = x / cell - column - 0.5, y / cell - row - 0.5, thing.size / cell, share
    return {"words": words, "mask": mask, "box": box}


class BatchMaker:
    """Builds the batch of one step. Picklable parts only, so it can live in a worker."""

    def __init__(self, packer: Packer, seed: int, cell: int):
        self.packer, self.seed, self.cell = packer, seed, cell

    def make(self, stage: int, step: int, source: Source) -> dict[str, np.ndarray | str | list]:
        rng = stream("train", self.seed, stage, step)
        if source.kind == "vision":
            return self._vision(source, rng)
        varied = rng.random() < source.varied
        if source.media == "image":
            form, frames = int(rng.integers(1, len(IMAGE_SIZES))) if varied else 0, 1
            width, height = IMAGE_SIZES[form]
        else:
            width, height, frames = (
                VIDEO_FORMS[int(rng.integers(1, 4))] if varied else VIDEO_FORMS[0]
            )
        batch = max(4, source.batch * 8 // frames) if frames > 8 else source.batch
        shape = (frames, height, width)
        length = len(self.packer.prefix(source.media, shape)[0]) + source.room
        dialog = rng.random() < source.dialog
        rows, pixels, names = [], [], []
        for _ in range(batch):
            scene = self._scene(source, width, height, frames, rng)
            pixels.append(self._pixels(scene, rng))
            segments, labels = self._segments(scene, source, rng)
            rows.append(self.packer.pack(source.media, shape, segments, length, dialog))
            names.append(labels)
        stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        used = int((stacked["segment"] >= 0).any(0).sum())
        stacked = {key: value[..., :used] for key, value in stacked.items()}
        return {**stacked, "frames": np.stack(pixels), "media": source.media, "names": names}

    def _scene(self, source, width: int, height: int, frames: int, rng) -> Scene:
        if source.media == "image":
            return image_scene(rng, width, height, source.objects)
        return video_scene(rng, width, height, frames)

    def _pixels(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        phase = 0.0 if scene.frames == 1 else float(rng.integers(0, 4)) / 4
        return _codec_noise(render(scene, [k + phase for k in range(scene.frames)]), rng)

    def _segments(self, scene: Scene, source: Source, rng: np.random.Generator):
        if source.kind == "pairs":
            pairs = _pairs(scene, rng)[:12]
            return [self.packer.pair(*pair) for pair in pairs], ["pairs"] * len(pairs)
        kinds = families(source.media) + (("video_existence",) if source.media == "video" else ())
        kinds += source.more
        segments_by_text: dict[str, tuple[tuple[list[int], list[int]], str]] = {}
        for name in (str(name) for _ in range(5) for name in rng.permutation(kinds)):
            question = ask(scene, name, rng)
            if question is not None and source.kind == "facts":
                segment = self.packer.pair(question.text[:-1], question.answer)
                segments_by_text.setdefault(question.text, (segment, name + "/fact"))
            elif question is not None:
                text, answer = _question_text(question, source.choice, rng)
                form = "" if answer == question.answer else "/choice"
                segment = self.packer.segment(source.media, text, answer)
                segments_by_text.setdefault(text, (segment, name + form))
        segments = list(segments_by_text.values())
        return [s for s, _ in segments], [n for _, n in segments]

    def _vision(self, source: Source, rng: np.random.Generator):
        """Images, or clips of two frames, with the labels of both frames for every token."""
        pixels, labels = [], []
        for _ in range(source.batch):
            if source.media == "image":
                scene, times = image_scene(rng, *source.size, objects=source.objects), [0.0, 0.0]
            else:
                scene, times = clip_scene(rng, *source.size), [0.0, 1.0]
            pixels.append(_codec_noise(render(scene, times[: scene.frames]), rng))
            both = [cell_labels(scene, time, self.cell) for time in times]
            labels.append({key: np.stack([one[key] for one in both]) for key in both[0]})
        stacked = {key: np.stack([one[key] for one in labels]) for key in labels[0]}
        return {**stacked, "frames": np.stack(pixels), "media": source.media}
