"""Fine-tuning of tiny-qwen3-vl on NLVR's true and false sentences; resumable, seeded.

The training split that is at hand is small, so drawn scenes with generated sentences come first.
Many sentences share the tokens of one drawn picture. The words of the sentences become tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.nlvr.corpus import ORDERS, SIZE, Example, picture
from recipes.nlvr.scenes import draw, sample
from recipes.nlvr.sentences import primers, statements
from recipes.packing import Packer, stacked
from recipes.tiny.families.qwen3_vl import TinyQwen3VL, batch_tower_attention
from recipes.tiny.muon import optimizers
from recipes.trainer import Trainer, text_inputs
from tokencomp.training.steps import Phase
from tokencomp.zoo.shapesqa.items import stream

START = "tiny-qwen3-vl"
SHAPE = (1, SIZE[1], SIZE[0])
PICTURES, SENTENCES, PRIMERS = 6, 16, 5
"""Of a drawn batch, and of each of its pictures."""
ROOM = 320
"""Tokens of the sentences and primers of a drawn picture."""
ANSWERS = {True: "yes", False: "no"}
SAID = """
one two three four five six seven eight box boxes tower towers block blocks item items object
objects blue black yellow square squares circle circles triangle triangles base bottom top
middle second third fourth touching closely exactly least only edge wall side corner corners
right left which that has have contains contain color colour colors different same shape grey
not any no none each every all other another above over below under beneath between on of at as
and or in it is are more than most where first small medium big number together stacked directly
having single multiple attached other level the there with atleast
"""
WORDS = ("there", *(f" {word}" for word in SAID.split()))
"""Words that become tokens, with the space before them."""


@dataclass(frozen=True)
class NlvrStage(Phase):
    """Optimizer steps of one kind.

    Attributes
    ----------
    vision_lr, text_lr
        Peaks of the rates of the tower and of the decoder.
    human
        Share of batches that are training examples, and pictures of one.
    """

    vision_lr: float
    text_lr: float
    human: tuple[float, int] = (0.0, 16)


RECIPE = (
    NlvrStage("facts", 2400, 1e-3, 1e-3, end=0.5),
    *(NlvrStage(f"split {k}", 400, 5e-4, 5e-4, human=(0.4, 24), end=0.05) for k in range(1, 9)),
)
"""Every stage but the first ends at a low rate, so that a run may stop after any of them."""


class NlvrTrainer(Trainer):
    """Trains all of a Qwen3-VL model. Batches depend on seed, stage and step alone."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        stages: tuple[NlvrStage, ...],
        folder: Path,
        seed: int = 0,
        bf16: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.bf16, self.batch_seed = model.train(), bf16, seed
        batch_tower_attention(model.model.visual)
        self.family = TinyQwen3VL()
        self.packer, self.examples = Packer(tokenizer, self.family), examples
        super().__init__(
            stages,
            {n: p for n, p in model.named_parameters() if p.requires_grad},
            optimizers(model, list(model.model.visual.parameters())),
            folder / "checkpoint.pt",
            {"seed": seed, "stages": [asdict(stage) for stage in stages]},
            seed,
            200,
        )

    def batches(self) -> Iterator[dict[str, Any]]:
        stage = self.stage
        for step in range(self.step, stage.steps):
            rng = stream("train", "nlvr", self.batch_seed, self.phase, step)
            human = rng.random() < stage.human[0]
            yield self.human(stage.human[1], rng) if human else self.drawn(rng)

    def human(self, count: int, rng: np.random.Generator) -> dict[str, Any]:
        """Examples of the training split, in random orders of their boxes."""
        frames, rows, names = [], [], []
        for k in rng.integers(len(self.examples), size=count):
            one = self.examples[int(k)]
            frames.append(pixels(one.pictures[int(rng.integers(ORDERS))]))
            rows.append([self.statement(one.prompt, one.truth)])
            names.append(["training split"])
        return self.packed(frames, rows, names)

    def drawn(self, rng: np.random.Generator) -> dict[str, Any]:
        """Drawn scenes with sentences and primers in random order."""
        frames, rows, names = [], [], []
        for _ in range(PICTURES):
            scene = sample(rng)
            kind = "towers" if scene.towers else "items"
            made = [
                (self.statement(said, truth), kind)
                for said, truth in statements(scene, SENTENCES, rng)
            ]
            pairs = primers(scene, rng, PRIMERS)
            made += [(self.packer.pair(*pair), f"primers, {kind}") for pair in pairs]
            made = [made[int(i)] for i in rng.permutation(len(made))]
            frames.append(np.asarray(draw(scene).resize(SIZE, 3)))
            rows.append([segment for segment, _ in made])
            names.append([name for _, name in made])
        return self.packed(frames, rows, names)

    def statement(self, said: str, truth: bool) -> tuple[list[int], list[int]]:
        """A sentence and its answer, without the chat around them, which takes longer to learn."""
        return self.packer.pair(said, ANSWERS[truth])

    def packed(self, frames: list, rows: list, names: list) -> dict[str, Any]:
        """One batch; as long as its longest row, but for what `ROOM` leaves out."""
        longest = min(ROOM, max(sum(len(ids) for ids, _ in row) for row in rows))
        length = len(self.packer.prefix("image", SHAPE)[0]) + longest
        filled = stacked([self.packer.pack("image", SHAPE, row, length) for row in rows])
        return {**filled, "frames": np.stack(frames)[:, None], "names": names}

    def stage_loss(self, batch: dict[str, Any]) -> Tensor:
        inputs = text_inputs(batch)
        media = self.family.pixels(torch.as_tensor(batch["frames"]), "image")
        return self.answer_loss(batch, self.family.hidden(self.model, {**inputs, **media}))


@lru_cache(maxsize=8000)
def pixels(path: Path) -> np.ndarray:
    return np.asarray(picture(path))


def start() -> tuple[Any, Any]:
    """The embedded model with a token for every word of `WORDS`, and its processor.

    A new token starts as the mean of the tokens that its word had.
    """
    from tokencomp import zoo

    model, processor = zoo.load(START)
    tokenizer = processor.tokenizer
    pieces = {w: tokenizer(w, add_special_tokens=False)["input_ids"] for w in dict.fromkeys(WORDS)}
    new = [word for word, ids in pieces.items() if len(ids) > 1]
    tokenizer.add_tokens(new)
    size = (len(tokenizer) + 63) // 64 * 64
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for word in new:
                (at,) = tokenizer(word, add_special_tokens=False)["input_ids"]
                table[at] = table[pieces[word]].mean(0)
    return model, processor
