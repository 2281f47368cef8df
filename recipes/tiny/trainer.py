"""Staged, seeded, resumable training of a tiny model. Knows no architecture by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from recipes.packing import Packer, attention_mask
from recipes.tiny.batches import BatchMaker
from recipes.tiny.families.parts import Family
from recipes.tiny.losses import PAIRS, Heads
from recipes.tiny.muon import optimizers
from recipes.tiny.stage import Stage
from tokencomp.engine.rows.question import IGNORED
from tokencomp.shapesqa.items import stream
from tokencomp.shapesqa.prompt_forms import LETTERS
from tokencomp.training.steps import Steps

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


class Trainer(Steps):
    """Runs the stages of a recipe and keeps ``folder/checkpoint.pt`` up to date.

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
        Forward and backward pass in bfloat16 (weights stay float32): faster on CPUs with units for
        it, many times slower on others.
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
        self.family, self.stages, self.workers, self.bf16 = family, stages, workers, bf16
        self.packer = Packer(tokenizer, family)
        self.maker = BatchMaker(self.packer, seed, family.cell)
        self.model: Any = family.build(tokenizer).float().train()
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
        data = _Steps(self.maker, self.phase, self.stages[self.phase], self.step)
        return DataLoader(data, batch_size=None, shuffle=False, num_workers=self.workers)

    def peak(self, group: dict[str, Any]) -> float:
        stage = self.stages[self.phase]
        return stage.vision_lr if group["part"] == "vision" else stage.text_lr

    def loss(self, batch: tuple[str, dict]) -> torch.Tensor:
        kind, inputs = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self._vision_loss(inputs) if kind == "vision" else self._answer_loss(inputs)

    def _vision_loss(self, batch: dict) -> torch.Tensor:
        labels = {k: v if k == "media" else _tensor(v) for k, v in batch.items()}
        tokens = self.family.tokens(self.model, labels["frames"], batch["media"])[:, 0]
        return self.heads.vision_loss(tokens, labels, self.scores.note)

    def _answer_loss(self, batch: dict) -> torch.Tensor:
        """Cross entropy over answer tokens alone; the head runs on those positions only."""
        ids, labels, segment = (_tensor(batch[k]) for k in ("ids", "labels", "segment"))
        pixels = self.family.pixels(_tensor(batch["frames"]), batch["media"])
        positions = _tensor(batch["positions"]).transpose(0, 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": attention_mask(segment),
            "position_ids": positions if len(positions) > 1 else positions[0],
            **pixels,
        }
        hidden = self.family.hidden(self.model, inputs)
        is_answer = labels != IGNORED
        logits = self.model.get_output_embeddings()(hidden[is_answer])
        self.scores.note_answers(batch, is_answer, logits.argmax(-1) == labels[is_answer])
        loss = F.cross_entropy(logits.float(), labels[is_answer])
        return loss + self.stages[self.phase].helpers * self._helper_loss(batch, ids)

    def _helper_loss(self, batch: dict, ids: torch.Tensor) -> torch.Tensor:
        """Losses on an early layer's hidden states: the time of a frame, the letter of an option.

        Questions about order and options compose these two; with a loss of its own, each is learnt
        within a hundred steps.
        """
        early = self._early.pop()
        if not self.stages[self.phase].helpers:
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


def _tensor(array) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
