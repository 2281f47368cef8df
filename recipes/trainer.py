"""The training of a model that learns to answer: rates by part, and the loss on answers."""

from __future__ import annotations

import logging
from abc import abstractmethod
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.packing import attention_mask
from recipes.tiny.muon import optimizers
from tokencomp.engine.prompt import IGNORED
from tokencomp.evaluation.environment import environment
from tokencomp.training.steps import RunningScores, Steps


def arguments(parser: ArgumentParser, out: Path) -> Namespace:
    """Parse the command line with the options of every training, and start log and threads."""
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop-after", type=int, help="steps in this call; writes what is there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    return args


class Trainer(Steps):
    """Runs the stages of a recipe, which have a peak rate `PART_lr` for every part of the model.

    A subclass sets `model` and `bf16`: forward and backward pass in bfloat16, which is faster on
    CPUs with units for it, and many times slower on others.
    """

    model: Any
    bf16: bool

    def prepare(
        self,
        stages: Sequence[Any],
        heads: Mapping[str, nn.Module],
        vision: Iterable[nn.Parameter],
        folder: Path,
        seed: int,
        save_every: int,
    ) -> None:
        """Initialise the training of all of `model`, and of `heads` at the rate of its tower."""
        trained = nn.ModuleDict({"model": self.model, **heads})
        new = [p for head in heads.values() for p in head.parameters()]
        super().__init__(
            stages,
            dict(trained.named_parameters()),
            optimizers(self.model, [*vision, *new]),
            folder / "checkpoint.pt",
            {"seed": seed, "stages": [asdict(stage) for stage in stages]},
            seed,
            save_every,
        )

    def facts(self, finished: bool, **more: Any) -> dict[str, Any]:
        """What `training.json` says of a training, `more` included."""
        return {
            "seed": self.seed,
            **more,
            "finished": finished,
            "steps": len(self.history),
            "seconds": round(self.seconds),
            "training_scores": self.scores.percent(),
            **environment(),
        }

    @property
    def stage(self) -> Any:
        """The current one."""
        return self.phases[self.phase]

    def peak(self, group: dict[str, Any]) -> float:
        return getattr(self.stage, f"{group['part']}_lr")

    def loss(self, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.stage_loss(batch)

    @abstractmethod
    def stage_loss(self, batch: Any) -> Tensor:
        """The loss of one batch of the current stage."""

    def answer_loss(self, batch: dict[str, Any], hidden: Tensor) -> Tensor:
        """Cross entropy over answer tokens alone; the head runs on those positions only.

        `batch` is `stacked` rows with the `names` of their segments, `hidden` (batch, length,
        width) what the decoder gives for its `text_inputs`.
        """
        labels = torch.as_tensor(batch["labels"])
        is_answer = labels != IGNORED
        logits = self.model.get_output_embeddings()(hidden[is_answer])
        note_answers(self.scores, batch, is_answer, logits.argmax(-1) == labels[is_answer])
        return F.cross_entropy(logits.float(), labels[is_answer])


def note_answers(
    scores: RunningScores, batch: dict[str, Any], is_answer: Tensor, right: Tensor
) -> None:
    """Share of segments whose every answer token was right, per name: batches never repeat.

    Parameters
    ----------
    batch
        Packed segments: `which` segment every token belongs to, and the `names` of segments.
    is_answer : Tensor, bool, shape (rows, tokens)
    right : Tensor, bool, shape (answer tokens,)
        In the order of `is_answer`.
    """
    rows = is_answer.nonzero()[:, 0].tolist()
    which = torch.as_tensor(batch["which"])[is_answer].tolist()
    whole: dict[tuple[int, int], bool] = defaultdict(lambda: True)
    for row, number, ok in zip(rows, which, right.tolist(), strict=True):
        whole[row, number] &= ok
    tally = defaultdict(list)
    for (row, number), ok in whole.items():
        tally[batch["names"][row][number]].append(ok)
    for name, oks in tally.items():
        scores.note(name, float(np.mean(oks)))


def text_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Ids, mask and positions of a batch of `stacked` rows, as decoders take them."""
    positions = torch.as_tensor(batch["positions"]).transpose(0, 1)
    return {
        "input_ids": torch.as_tensor(batch["ids"]),
        "attention_mask": attention_mask(torch.as_tensor(batch["segment"])),
        "position_ids": positions if len(positions) > 1 else positions[0],
    }


def share_right(logits: Tensor, targets: Tensor) -> float:
    """Share of the rows of logits (..., classes) whose largest is that of the target."""
    return (logits.argmax(-1) == targets).float().mean().item()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by two products, several times faster on a CPU than torch's for such short ones."""
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(value.dtype) @ value


def attend_by_products(language_model: Any) -> None:
    """Let a decoder of transformers use `attend`, all query heads of a key head in one product."""
    from transformers import AttentionInterface

    AttentionInterface.register("products", _grouped)
    language_model.config._attn_implementation = "products"


def _grouped(module, query, key, value, mask, scaling=None, **_):
    """Query (batch, heads, length, width) on fewer key heads; the mask is bool or None."""
    batch, heads, length, width = query.shape
    folded = batch, key.shape[1], heads // key.shape[1] * length, width
    if mask is not None:
        mask = mask.repeat(1, 1, heads // key.shape[1], 1)
    out = attend(query.reshape(folded), key, value, mask)
    return out.view(batch, heads, length, width).transpose(1, 2), None
