"""Training sequences of StampsQA: a pure function of (seed, stage, step)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.packing import Packer, Placeholders, stacked
from recipes.photographs.model import CELL, IMAGE, planes
from recipes.photographs.questions import COUNTS, EDGES, FAMILIES, outermost
from recipes.photographs.scenes import (
    SIZE,
    Library,
    StampScene,
    cell_letters,
    cell_names,
    render,
    sample,
    sample_words,
)
from recipes.tiny.letters import letters_prompt
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.prompt_forms import letter

Segment = tuple[list[int], list[int]]
Grids = list[list[list[str]]]


def visual_tokens(shape: tuple[int, int, int]) -> int:
    """Of a picture of (1, height, width) px."""
    return (shape[1] // CELL) * (shape[2] // CELL)


@dataclass(frozen=True)
class Mixture:
    """What the sequences of a stage hold.

    Attributes
    ----------
    primers
        Whether there are one-hop pairs: "left:" → thing, thing → side, "things:" → number.
    questions
        At most so many questions in words.
    letters
        At most so many questions with lettered options.
    """

    primers: bool = True
    questions: int = 0
    letters: int = 0


class StampBatches:
    """Builds the batch of one step.

    Parameters
    ----------
    tokenizer
        With the chat template of the model.
    library
        Photographs.
    seed
        Of the training run.
    """

    def __init__(self, tokenizer: Any, library: Library, seed: int = 0) -> None:
        self.packer = Packer(tokenizer, Placeholders("image", IMAGE, visual_tokens))
        self.library, self.seed = library, seed

    def scenes(
        self, stage: int, step: int, batch: int
    ) -> tuple[np.random.Generator, list[StampScene]]:
        rng = stream("train", "stamps batches", self.seed, stage, step)
        return rng, [sample(rng, self.library, "train") for _ in range(batch)]

    def pixels(self, scenes: list[StampScene]) -> Any:
        """float32 (batch, 3, SIZE, SIZE)."""
        import torch

        return torch.stack([planes(render(scene, self.library)) for scene in scenes])

    def cells(self, stage: int, step: int, batch: int, words: int = 0) -> tuple[Any, Grids, Grids]:
        """Pixels, and what each visual token shows, for naming it without the decoder.

        `words` of the scenes hold words alone. The two grids of a scene hold, by row and column,
        the names of things and words, and letters.
        """
        rng, scenes = self.scenes(stage, step, batch - words)
        scenes += [sample_words(rng, self.library, "train") for _ in range(words)]
        names = [cell_names(s, self.library, CELL) for s in scenes]
        return self.pixels(scenes), names, [cell_letters(s, CELL) for s in scenes]

    def make(self, stage: int, step: int, batch: int, mixture: Mixture) -> dict[str, Any]:
        """Rows as `Packer.pack` gives them, stacked; `pixels`; `names` of the segments."""
        rng, scenes = self.scenes(stage, step, batch)
        filled = [self.segments(scene, mixture, rng) for scene in scenes]
        rows, names = [], [[name for name, _ in one] for one in filled]
        prefix = len(self.packer.prefix("image", (1, SIZE, SIZE))[0])
        longest = max(sum(len(s[0]) for _, s in one) for one in filled)
        for one in filled:
            segments = [segment for _, segment in one]
            rows.append(self.packer.pack("image", (1, SIZE, SIZE), segments, prefix + longest))
        return {**stacked(rows), "pixels": self.pixels(scenes), "names": names}

    def segments(
        self, scene: StampScene, mixture: Mixture, rng: np.random.Generator
    ) -> list[tuple[str, Segment]]:
        """Primers and questions in random order, with the name under which each is scored."""
        out: list[tuple[str, Segment]] = []
        if mixture.primers:
            out += [("primer " + n, self.packer.pair(k, v)) for n, k, v in primers(scene)]
        for form, limit in (("", mixture.questions), ("/letters", mixture.letters)):
            chosen = [str(f) for f in rng.permutation([*FAMILIES])] * 2
            texts: set[str] = set()
            for family in chosen:
                query = FAMILIES[family](scene, self.library.names, rng)
                if query is None or query.text in texts or len(texts) == limit:
                    continue
                texts.add(query.text)
                text, answer = query.text, query.answer
                if form:
                    text, answer = letters_prompt(query), letter(query)
                out.append((family + form, self.packer.segment("image", text, f" {answer}")))
        return [out[int(i)] for i in rng.permutation(len(out))]


def primers(scene: StampScene) -> list[tuple[str, str, str]]:
    """One-hop pairs (name, key, value), three or four tokens each.

    Questions about places stay at chance for long without labels that name a place.
    """
    out = []
    for edge in EDGES:
        thing = outermost(scene, edge)
        if thing is not None:
            out.append(("place", f"{edge}:", f" {thing.name}"))
    for thing in scene.things:
        for axis, words in enumerate((("left", "right"), ("top", "bottom"))):
            if abs(thing.center[axis] - SIZE / 2) >= SIZE / 16:
                word = words[int(thing.center[axis] > SIZE / 2)]
                out.append(("half", f"{thing.name} {words[0]}/{words[1]}:", f" {word}"))
    if scene.things:
        out.append(("count", "things:", f" {COUNTS[len(scene.things) - 1]}"))
    for text in scene.texts:
        out.append(("reading", "text:", f" {text.text}"))
    return out
