"""Training batches of ShapesQA: a pure function of (seed, stage, step)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from recipes.packing import Packer, stacked
from recipes.tiny.labels import GLYPHS, cell_labels, text_labels
from recipes.tiny.letters import FORMS, Segment, dense_options, whole_form
from recipes.tiny.primers import primer_pairs
from recipes.tiny.tokenizer import FREE_FORM_SUFFIX
from recipes.tiny.training_scenes import BACKGROUNDS, training_scene
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.prompt_forms import letter
from tokencomp.zoo.shapesqa.questions import Question, ask, families
from tokencomp.zoo.shapesqa.render import canvas_of, paint
from tokencomp.zoo.shapesqa.scenes import Scene
from tokencomp.zoo.shapesqa.textures import background

IMAGE_SIZES = ((224, 224), (280, 224), (196, 252), (280, 280), (168, 168))
# Sizes that the processor brings drawings of any aspect ratio to.
DRAWING_SIZES = ((392, 280), (280, 392), (336, 336), (252, 168), (448, 196), (196, 448), (224, 224))
VIDEO_FORMS = ((224, 224, 8), (224, 224, 16), (168, 224, 8), (224, 224, 12))
FRAME_RATES = (24.0, 24.0, 24.0, 4.0, 2.0, 1.0)  # processors assume 24 by default
LONG_RATES = (24.0, 4.0, 2.0, 1.0, 0.5, 0.25)  # 64 frames: 3 seconds to 4 minutes
LONG_SIDES = (112, 112, 168, 224)  # small ones hold as many events for a quarter of the work
TEXT_ONLY = (1, 56, 56)  # what letters are learnt beside: a picture of four tokens


@dataclass(frozen=True)
class Source:
    """What one batch holds.

    `kind` is "vision" (per-token labels), "facts" (question and answer without the chat around
    them, one hop shorter), "questions" (in the chat), or "letters" and "forms" (options without a
    picture, see `letters`). `media` is "image" or "video"; `scene` one of those of
    `training_scene`. `primers` are kinds of one-hop pairs; `families` None is all of the media,
    `more` names some that occur twice as often. `choice` is the share of multiple-choice questions;
    `varied` the share of batches of another size or frame count than 224×224 × 8; `dialog` the
    share of batches that are chats of several turns; `text` the share of images with a word; with
    `spell` the visual tokens of words and digits are labelled with them; with `repeat` a question
    comes up to five times with other options each time; `size` is for "vision" alone. Clips of
    a source with `lengths` have as many frames, at `LONG_RATES`, and `sides` pixels a side.
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
    scene: str = "usual"
    primers: tuple[str, ...] = ()
    families: tuple[str, ...] | None = None
    text: float = 0.0
    spell: bool = False
    repeat: bool = False
    lengths: tuple[int, ...] = ()
    sides: tuple[int, ...] = LONG_SIDES


def codec_noise(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What files do to pixels: JPEG with 4:2:0 chroma, on half of the samples."""
    if rng.random() < 0.5:
        return frames
    t, h, w, _ = frames.shape
    buffer = io.BytesIO()
    quality = int(rng.integers(70, 96))
    Image.fromarray(frames.reshape(t * h, w, 3)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)).reshape(t, h, w, 3)


@lru_cache(maxsize=1500)
def _cached_canvas(width: int, height: int, vivid: bool, seed: int) -> np.ndarray:
    return background(seed, width, height, vivid).round().astype(np.uint8)


def frames_of(scene: Scene, times: list[float]) -> np.ndarray:
    """Frames of a training scene; its background comes from a limited, cached set."""
    if scene.look.flat is None and scene.look.pan == (0.0, 0.0):
        seed = scene.background % BACKGROUNDS
        canvas = _cached_canvas(scene.width, scene.height, scene.look.vivid, seed)
    else:
        canvas = canvas_of(scene)
    return np.stack([paint(scene, time, canvas) for time in times])


def spell(packer: Packer, cell: int, row: dict, scene: Scene, media: str, number: int) -> None:
    """Label the visual tokens of `row` that show a word or a digit with its token.

    The decoder then learns to name what a visual token shows apart from where to look.
    """
    marks = text_labels(scene, cell)
    glyphs, words = marks["glyph"].ravel(), marks["word"].ravel()
    (pad,) = packer.ids(packer.family.placeholder(media))
    for place, at in enumerate((row["ids"] == pad).nonzero()[0]):
        glyph = GLYPHS[glyphs[place] - 1] if glyphs[place] > 0 else ""
        name = WORDS[words[place] - 1] if words[place] > 0 else glyph
        if name in WORDS or name.isdigit():
            (row["labels"][at],) = packer.ids(name)
            row["which"][at] = number


class BatchMaker:
    """Builds the batch of one step. Picklable parts only, so it can live in a worker."""

    def __init__(self, packer: Packer, seed: int, cell: int):
        self.packer, self.seed, self.cell = packer, seed, cell

    def make(self, stage: int, step: int, source: Source) -> dict[str, np.ndarray | str | list]:
        rng = stream("train", self.seed, stage, step)
        if source.kind == "vision":
            return self._vision(source, rng)
        shape = self._shape(source, rng)
        frames = shape[0]
        batch = max(4, source.batch * 8 // frames) if frames > 8 else source.batch
        if source.lengths:
            batch = max(1, source.batch * 8 * 224**2 // (frames * shape[1] * shape[2]))
        elif shape[1] * shape[2] > 224**2 * 1.3:
            batch = max(4, batch * 224**2 // (shape[1] * shape[2]))
        rates = LONG_RATES if source.lengths else FRAME_RATES
        fps = rates[int(rng.integers(len(rates)))]
        length = len(self.packer.prefix(source.media, shape, fps)[0]) + source.room
        dialog = rng.random() < source.dialog
        rows, pixels, names = [], [], []
        for _ in range(batch):
            scene = training_scene(rng, source.scene, shape, source.objects, source.text)
            phase = 0.0 if frames == 1 else float(rng.integers(0, 4)) / 4
            pixels.append(codec_noise(frames_of(scene, [k + phase for k in range(frames)]), rng))
            segments, labels = self._segments(scene, source, rng)
            row = self.packer.pack(source.media, shape, segments, length, dialog, fps)
            if source.spell:
                spell(self.packer, self.cell, row, scene, source.media, len(labels))
                labels = [*labels, "spelling"]
            rows.append(row)
            names.append(labels)
        filled = stacked(rows)
        used = int((filled["segment"] >= 0).any(0).sum())
        filled = {key: value[..., :used] for key, value in filled.items()}
        return {**filled, "frames": np.stack(pixels), "media": source.media, "names": names}

    def _shape(self, source: Source, rng: np.random.Generator) -> tuple[int, int, int]:
        """(frames, height, width) of one batch."""
        if source.kind in ("letters", "forms"):
            return TEXT_ONLY
        varied = rng.random() < source.varied
        if source.lengths:
            side = source.sides[int(rng.integers(len(source.sides)))]
            return source.lengths[int(rng.integers(len(source.lengths)))], side, side
        if source.media == "video":
            width, height, frames = (
                VIDEO_FORMS[int(rng.integers(1, 4))] if varied else VIDEO_FORMS[0]
            )
            return frames, height, width
        sizes = DRAWING_SIZES if source.scene == "plain" else IMAGE_SIZES
        width, height = sizes[int(rng.integers(1, len(sizes)))] if varied else IMAGE_SIZES[0]
        return 1, height, width

    def _segments(self, scene: Scene, source: Source, rng: np.random.Generator):
        """Primers and questions in random order, with the name under which each is scored."""
        if source.kind in ("letters", "forms"):
            make = dense_options if source.kind == "letters" else whole_form
            return [make(self.packer, rng) for _ in range(12)], [source.kind] * 12
        out: list[tuple[Segment, str]] = [
            (self.packer.pair(*pair), f"{name}-{source.media}")
            for name in source.primers
            for pair in primer_pairs(name, scene, rng)
        ]
        kinds = source.families
        if kinds is None:
            kinds = families(source.media)
            kinds += ("video_existence",) if source.media == "video" else ()
        kinds += source.more
        prompts: set[tuple[str, ...]] = set()
        for name in (
            str(name) for _ in range(5 if kinds else 0) for name in rng.permutation(kinds)
        ):
            question = ask(scene, name, rng)
            if question is None:
                continue
            prompt = (question.text, *(question.options if source.repeat else ()))
            if prompt not in prompts:
                prompts.add(prompt)
                out.append(self._question(question, source, rng))
        order = rng.permutation(len(out)) if source.primers else range(len(out))
        return [out[i][0] for i in order], [out[i][1] for i in order]

    def _question(self, question: Question, source: Source, rng) -> tuple[Segment, str]:
        """One question in one of the forms users and benchmarks use."""
        if rng.random() < source.choice:
            text, answer = FORMS[int(rng.integers(len(FORMS)))](question), letter(question)
            name = question.family + "/choice"
        else:
            suffix = FREE_FORM_SUFFIX if rng.random() < 0.2 else ""
            text, answer, name = question.text + suffix, question.answer, question.family
        if source.kind == "facts":
            text = text if answer != question.answer else question.text[:-1]
            return self.packer.pair(text, answer), name + "/fact"
        return self.packer.segment(source.media, text, answer), name

    def _vision(self, source: Source, rng: np.random.Generator):
        """Images, or clips of two frames, with the labels of both frames for every token."""
        pixels, labels = [], []
        width, height = source.size
        times = [0.0, 1.0] if source.media == "video" else [0.0, 0.0]
        shape = (2 if source.media == "video" else 1, height, width)
        for _ in range(source.batch):
            scene = training_scene(rng, source.scene, shape, source.objects, source.text)
            pixels.append(codec_noise(frames_of(scene, times[: scene.frames]), rng))
            both = [cell_labels(scene, time, self.cell) for time in times]
            labels.append({**stacked(both), **text_labels(scene, self.cell)})
        return {**stacked(labels), "frames": np.stack(pixels), "media": source.media}
