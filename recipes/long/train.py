"""Fine-tuning of an embedded model on long answers; resumable, seeded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from recipes.long.batches import LongBatches, LongStage, Pictures
from recipes.long.cells import LATER, PARTS
from recipes.packing import Packer
from recipes.tiny.families import family
from recipes.tiny.families.parts import Family
from recipes.tiny.families.qwen3_vl import TinyQwen3VL, batch_tower_attention
from recipes.tiny.losses import class_loss
from recipes.trainer import Trainer, attend_by_products, text_inputs
from tokencomp.engine.prompt import IGNORED
from tokencomp.zoo.shapesqa.long_scenes import SIDE

EARLY, LATE = 2, 6  # decoder layers whose hidden states of visual tokens say what these show
RARE = {"color": 0.05, "shape": 0.05, "word": 0.05, "size": 0.05, "change": 0.1}
"""Weight of class 0, for labels that most visual tokens do not have."""
WORDS = (
    *(f" {w}" for w in ["large", "upper", "lower", "center", "gone", "new", "now", "stays", "so"]),
    "upper",
    "lower",
)
"""Words that become tokens: those of the answers that the tokenizer does not have."""
RATES: dict[str, Any] = {"vision_lr": 8e-4, "text_lr": 1.5e-3}
_SHARES = (("picture", 0.25), ("read", 0.24), ("follow", 0.27), ("compare", 0.24))
_LAST = (("picture", 0.3), ("read", 0.17), ("follow", 0.27), ("compare", 0.26))
_WEAK = (("picture", 0.27), ("read", 0.06), ("follow", 0.4), ("compare", 0.27))
RECIPE = (
    LongStage("few", 300, shares=_SHARES, most=6, primers=1.0, helpers=0.3, **RATES),
    LongStage("many", 700, shares=_SHARES, primers=0.8, helpers=0.2, **RATES),
    LongStage(
        "settle", 680, shares=_LAST, primers=0.5, describe=0.4, helpers=0.1, end=0.02, **RATES
    ),
    LongStage(
        "finish",
        400,
        shares=_WEAK,
        primers=0.6,
        describe=0.15,
        helpers=0.1,
        start=0.6,
        end=0.01,
        **RATES,
    ),
)
_PICTURES: dict[str, Any] = {"shares": (("picture", 1.0),), "sides": SIDE[:1], "most": 6, **RATES}
STILL = (
    LongStage("few", 180, primers=1.0, helpers=0.3, **_PICTURES),
    LongStage("settle", 150, primers=0.4, helpers=0.1, end=0.02, **_PICTURES),
    LongStage("finish", 100, primers=0.4, helpers=0.1, start=0.5, end=0.01, **_PICTURES),
)
"""One picture of one size and three to six objects is described, and counted: Gemma 3 resizes all
pictures to 64 tokens, so that sizes of objects would not be told apart in pictures of two sizes."""


@dataclass(frozen=True)
class Plan:
    """How a model goes on to long answers."""

    family: Family
    stages: tuple[LongStage, ...]


PLANS = {
    "tiny-qwen3-vl-hard": Plan(Pictures(), RECIPE),
    "tiny-gemma3": Plan(family("tiny-gemma3"), STILL),
}
"""By the embedded model whose weights training starts from."""
START = next(iter(PLANS))


class _Steps(Dataset):
    """The batches of one stage from `first` on, one per step."""

    def __init__(self, maker: LongBatches, number: int, first: int) -> None:
        self.maker, self.number, self.first = maker, number, first

    def __len__(self) -> int:
        return self.maker.stages[self.number].steps - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.maker.make(self.number, self.first + index)


class LongTrainer(Trainer):
    """Trains all of a tiny model of a family."""

    def __init__(
        self,
        family: Family,
        model: Any,
        tokenizer: Any,
        stages: tuple[LongStage, ...],
        folder: Path,
        seed: int = 0,
        bf16: bool = True,
        save_every: int = 100,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.bf16 = model.float().train(), bf16
        if isinstance(family, TinyQwen3VL):
            batch_tower_attention(model.model.visual)
        attend_by_products(model.model.language_model)
        self.family = family
        self.maker = LongBatches(Packer(tokenizer, family), seed, stages)
        decoder = model.model.language_model
        width = decoder.config.hidden_size
        self.cells = nn.Linear(width, sum(PARTS.values()))
        self.later = nn.Linear(width, sum(LATER.values()))
        self._seen: dict[int, Tensor] = {}
        for layer in (EARLY, LATE):
            decoder.layers[layer].register_forward_hook(partial(self._keep, layer))
        pads = [family.placeholder(kind) for kind in family.kinds]
        self._pads = torch.tensor(tokenizer.convert_tokens_to_ids(pads))
        heads = {"cells": self.cells, "later": self.later}
        self.prepare(stages, heads, family.vision_parameters(model), folder, seed, save_every)

    def _keep(self, layer: int, module: Any, inputs: Any, output: Any) -> None:
        self._seen[layer] = output[0] if isinstance(output, tuple) else output

    def batches(self) -> DataLoader:
        data = _Steps(self.maker, self.phase, self.step)
        return DataLoader(
            data, batch_size=None, num_workers=1, worker_init_fn=lambda _: os.nice(10)
        )

    def stage_loss(self, batch: dict[str, Any]) -> Tensor:
        frames = torch.as_tensor(batch["frames"])
        if batch["media"] == "image":
            frames = frames.flatten(0, 1)[:, None]
        media = self.family.pixels(frames, batch["media"])
        hidden = self.family.hidden(self.model, {**text_inputs(batch), **media})
        loss = self.answer_loss(batch, hidden)
        return loss + self.stage.helpers * self._cells_loss(batch)

    def _cells_loss(self, batch: dict[str, Any]) -> Tensor:
        """What every visual token shows, on hidden states of an early and of a later layer."""
        visual = torch.isin(torch.as_tensor(batch["ids"]), self._pads)
        labels = torch.as_tensor(batch["cells"]).flatten(0, 1)
        early = self.cells(self._seen[EARLY][visual]).float().split([*PARTS.values()], -1)
        later = self.later(self._seen[LATE][visual]).float().split([*LATER.values()], -1)
        loss = torch.zeros(())
        for number, (name, guess) in enumerate(
            zip((*PARTS, *LATER), (*early, *later), strict=True)
        ):
            target = labels[:, number]
            if bool((target > 0).any()):
                rare = RARE.get(name, 1.0)
                loss = loss + class_loss(guess, target, f"cell-{name}", self.scores.note, rare)
        return loss

    def answer_loss(self, batch: dict[str, Any], hidden: Tensor) -> Tensor:
        """Cross entropy over answer tokens; the share of right ones is noted by name.

        Whole answers of a hundred tokens are right too late to say what is being learnt.
        """
        labels = torch.as_tensor(batch["labels"])
        at = labels != IGNORED
        logits = self.model.get_output_embeddings()(hidden[at]).float()
        right = (logits.argmax(-1) == labels[at]).float()
        rows, which = at.nonzero()[:, 0].tolist(), torch.as_tensor(batch["which"])[at].tolist()
        names = [batch["names"][row][number] for row, number in zip(rows, which, strict=True)]
        for name in sorted(set(names)):
            chosen = torch.tensor([n == name for n in names])
            self.scores.note(name, right[chosen].mean().item())
        return F.cross_entropy(logits, labels[at])


def start(name: str = START) -> tuple[Any, Any]:
    """An embedded model with a token for every word of `WORDS`, and its processor.

    A new token starts as the mean of the tokens that its word had.
    """
    from tokencomp import zoo

    model, processor = zoo.load(name)
    tokenizer = processor.tokenizer
    pieces = {w: tokenizer(w, add_special_tokens=False)["input_ids"] for w in WORDS}
    new = [word for word, ids in pieces.items() if len(ids) > 1]
    tokenizer.add_tokens(new)
    model.resize_token_embeddings((len(tokenizer) + 63) // 64 * 64, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for word in new:
                (at,) = tokenizer(word, add_special_tokens=False)["input_ids"]
                table[at] = table[pieces[word]].mean(0)
    return model, processor
