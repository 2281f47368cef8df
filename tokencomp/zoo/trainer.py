"""Staged, seeded, resumable training of a tiny model. Knows no architecture by name."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from tokencomp.engine.question import IGNORED
from tokencomp.shapesqa.items import stream
from tokencomp.shapesqa.prompt_forms import LETTERS
from tokencomp.storage import replace_file
from tokencomp.zoo.batches import BatchMaker
from tokencomp.zoo.families.parts import Family
from tokencomp.zoo.losses import PAIRS, Heads
from tokencomp.zoo.muon import optimizers
from tokencomp.zoo.packing import Packer, attention_mask
from tokencomp.zoo.scores import RunningScores
from tokencomp.zoo.stage import Stage

log = logging.getLogger(__name__)
MUON_SCALE = 6.0  # rate of Muon over the rate of AdamW
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


class Trainer:
    """Runs the stages of a recipe and keeps ``folder/checkpoint.pt`` up to date.

    Batches depend on (seed, stage, step) only, so a run that was killed and started again ends with
    the same weights as one that was not.

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
        self.family, self.stages, self.folder = family, stages, Path(folder)
        self.workers, self.save_every, self.bf16 = workers, save_every, bf16
        self.packer = Packer(tokenizer, family)
        self.maker = BatchMaker(self.packer, seed, family.cell)
        self.model: Any = family.build(tokenizer).float().train()
        self.heads = Heads(family.language_config(self.model).hidden_size)
        self._early: list[torch.Tensor] = []
        decoder: Any = family.parts(self.model)["decoder"]
        decoder.layers[EARLY].register_forward_hook(self._keep)
        self._video_token = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        vision = [*family.vision_parameters(self.model), *self.heads.parameters()]
        self.optimizers = optimizers(self.model, vision)
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.scores = RunningScores()
        self._resume()

    def _keep(self, module, inputs, output) -> None:
        self._early[:] = [output[0] if isinstance(output, tuple) else output]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, stop_after: int | None = None) -> bool:
        """Train until the recipe is done (True) or ``stop_after`` steps are done (False)."""
        steps_done = 0
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            for kind, batch in self._bar(stage):
                begin = time.perf_counter()
                self._set_rate(stage)
                self._update(kind, batch)
                self.step += 1
                steps_done += 1
                self.seconds += time.perf_counter() - begin
                if self.step % self.save_every == 0:
                    self.save()
                if steps_done == stop_after:
                    self.save()
                    return False
            self.stage, self.step = self.stage + 1, 0
            self.save()
        return True

    def _bar(self, stage: Stage):
        data = _Steps(self.maker, self.stage, stage, self.step)
        loader = DataLoader(data, batch_size=None, shuffle=False, num_workers=self.workers)
        bar = tqdm(loader, desc=stage.name, initial=self.step, total=stage.steps, mininterval=2)
        for batch in bar:
            yield batch
            shown = {k: f"{100 * v:.0f}" for k, v in sorted(self.scores.items())}
            bar.set_postfix(shown, refresh=False)
            if self.step % 50 == 0:
                log.info("%s %d %s", stage.name, self.step, shown)

    def _set_rate(self, stage: Stage) -> None:
        done = self.step / max(1, stage.steps)
        shape = stage.end + (stage.start - stage.end) * 0.5 * (1 + math.cos(math.pi * done))
        factor = shape * min(1.0, (self.step + 1) / stage.warmup)
        for optimizer, scale in zip(self.optimizers, (1.0, MUON_SCALE), strict=True):
            for group in optimizer.param_groups:
                peak = stage.vision_lr if group["part"] == "vision" else stage.text_lr
                group["lr"] = peak * factor * scale

    def _update(self, kind: str, batch: dict) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self._vision_loss(batch) if kind == "vision" else self._answer_loss(batch)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

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
        return loss + self.stages[self.stage].helpers * self._helper_loss(batch, ids)

    def _helper_loss(self, batch: dict, ids: torch.Tensor) -> torch.Tensor:
        """Losses on an early layer's hidden states: the time of a frame, the letter of an option.

        Questions about order and options compose these two; with a loss of its own, each is learnt
        within a hundred steps.
        """
        early = self._early.pop()
        if not self.stages[self.stage].helpers:
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

    def save(self) -> None:
        """Write the checkpoint; a kill in the middle leaves the previous one intact."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.stage, self.step, self.seconds),
            "scores": dict(self.scores),
        }
        replace_file(self.checkpoint, partial(torch.save, state))

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stage, self.step, self.seconds = state["progress"]
        self.scores = RunningScores(state["scores"])


def _tensor(array) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
