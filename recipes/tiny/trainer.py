"""The training of a tiny model. Knows no architecture by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from recipes.packing import Packer
from recipes.tiny.batches import BatchMaker
from recipes.tiny.families.parts import Family
from recipes.tiny.losses import PAIRS, Heads
from recipes.tiny.muon import optimizers
from recipes.tiny.stage import Stage
from recipes.trainer import Trainer, text_inputs
from tokencomp.engine.prompt import IGNORED
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.prompt_forms import LETTERS

EARLY = 2  # decoder layer from whose hidden states heads predict times and letters


class _Steps(Dataset):
    """The batches of one stage from ``first`` on, one per step."""

    def __init__(self, maker: BatchMaker, number: int, stage: Stage, first: int):
        self.maker, self.number, self.stage, self.first = maker, number, stage, first

    def __len__(self) -> int:
        return self.stage.steps - self.first

    def __getitem__(self, index: int):
        step = self.first + index
        rng = stream("train", self.maker.seed, self.number, step, 1)
        weights = np.array([weight for weight, _ in self.stage.sources])
        source = self.stage.sources[int(rng.choice(len(weights), p=weights / weights.sum()))][1]
        return source.kind, self.maker.make(self.number, step, source)


class TinyTrainer(Trainer):
    """Trains a tiny model from scratch, or on from weights that are copied into it.

    Batches depend on (seed, stage, step) only.

    Parameters
    ----------
    family, tokenizer
        Architecture and vocabulary.
    stages : tuple of Stage
    folder : Path
        Where the checkpoint lives.
    seed : int
    workers : int
        Processes that render batches; 0 renders in this process.
    save_every : int
        Steps between checkpoints.
    bf16 : bool
        See `Trainer`; weights stay float32.
    """

    def __init__(
        self,
        family: Family,
        tokenizer,
        stages: tuple[Stage, ...],
        folder: Path,
        seed: int = 0,
        workers: int = 1,
        save_every: int = 50,
        bf16: bool = False,
    ):
        torch.manual_seed(seed)
        self.family, self.workers, self.bf16 = family, workers, bf16
        self.packer = Packer(tokenizer, family)
        self.maker = BatchMaker(self.packer, seed, family.cell)
        self.model = family.build(tokenizer).float().train()
        self.heads = Heads(family.language_config(self.model).hidden_size)
        self._early: list[torch.Tensor] = []
        decoder: Any = family.parts(self.model)["decoder"]
        decoder.layers[EARLY].register_forward_hook(self._keep)
        self._video_token = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        vision = [*family.vision_parameters(self.model), *self.heads.parameters()]
        trained = nn.ModuleDict({"model": self.model, "heads": self.heads})
        super().__init__(
            stages,
            dict(trained.named_parameters()),
            optimizers(self.model, vision),
            Path(folder) / "checkpoint.pt",
            {
                "family": type(family).__name__,
                "seed": seed,
                "stages": [asdict(stage) for stage in stages],
            },
            seed,
            save_every,
        )

    def _keep(self, module, inputs, output) -> None:
        self._early[:] = [output[0] if isinstance(output, tuple) else output]

    def batches(self) -> DataLoader:
        data = _Steps(self.maker, self.phase, self.stage, self.step)
        return DataLoader(data, batch_size=None, shuffle=False, num_workers=self.workers)

    def stage_loss(self, batch: tuple[str, dict]) -> torch.Tensor:
        kind, inputs = batch
        return self._vision_loss(inputs) if kind == "vision" else self._text_loss(inputs)

    def _vision_loss(self, batch: dict) -> torch.Tensor:
        labels = {k: v if k == "media" else torch.as_tensor(v) for k, v in batch.items()}
        tokens = self.family.tokens(self.model, labels["frames"], batch["media"])[:, 0]
        return self.heads.vision_loss(tokens, labels, self.scores.note)

    def _text_loss(self, batch: dict) -> torch.Tensor:
        inputs = text_inputs(batch)
        pixels = self.family.pixels(torch.as_tensor(batch["frames"]), batch["media"])
        loss = self.answer_loss(batch, self.family.hidden(self.model, {**inputs, **pixels}))
        return loss + self.stage.helpers * self._helper_loss(batch, inputs["input_ids"])

    def _helper_loss(self, batch: dict, ids: torch.Tensor) -> torch.Tensor:
        """Losses on an early layer's hidden states: the time of a frame, the letter of an option.

        Questions about order and options compose these two; with a loss of its own, each is learnt
        within a hundred steps.
        """
        early = self._early.pop()
        if not self.stage.helpers:
            return torch.zeros(())
        loss = self.heads.letter_loss(early, self._letters(ids), self.scores.note)
        if batch["media"] == "video":
            visual = ids == self._video_token
            pairs = batch["frames"].shape[1] // 2
            if pairs <= PAIRS:
                loss = loss + self.heads.clock_loss(early, visual, pairs, self.scores.note)
        return loss

    def _letters(self, ids: torch.Tensor) -> torch.Tensor:
        """The letter, 0…4, of each option word in "(A) word" and "A. word"; -100 elsewhere."""
        letters = torch.full_like(ids, IGNORED)
        for number, letter in enumerate(LETTERS):
            for mark, close in ((f"({letter}", ")"), (letter, ".")):
                (first,), (second,) = self.packer.ids(mark), self.packer.ids(close)
                at = (ids[:, :-2] == first) & (ids[:, 1:-1] == second)
                letters[:, 2:][at] = number
        return letters
