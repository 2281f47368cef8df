"""What the full model of a training run answers to NLVR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.nlvr.build import reached, trainer_of
from recipes.nlvr.corpus import Example, examples
from recipes.nlvr.train import ANSWERS, NlvrTrainer, pixels
from recipes.trainer import text_inputs

SPLITS = ("dev", "test", "hidden")
BATCH, RESAMPLES = 33, 10_000


def evaluate(corpus: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Facts of the training, and for every split the right answers of the full model."""
    training = reached(corpus, out, seed)
    trainer, _ = trainer_of(corpus, out, seed)
    splits = {}
    for split in SPLITS:
        rows = examples(corpus, split)
        splits[split] = summary(rows, answers(trainer, rows))
    return {"training": training, "splits": splits}


@torch.inference_mode()
def answers(trainer: NlvrTrainer, rows: Sequence[Example]) -> list[bool]:
    """Whether "yes" has the larger logit of the two answers, for the first order of the boxes."""
    yes, no = (trainer.packer.tokenizer(ANSWERS[x])["input_ids"][0] for x in (True, False))
    model, said = trainer.model.eval(), []
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        frames = [pixels(one.pictures[0]) for one in some]
        batch = trainer.packed(
            frames,
            [[trainer.statement(x.prompt, True)] for x in some],
            [[""] for _ in some],
        )
        media = trainer.family.pixels(torch.as_tensor(batch["frames"]), "image")
        hidden = trainer.family.hidden(model, {**text_inputs(batch), **media})
        labels = torch.as_tensor(batch["labels"])
        at = (labels == yes).int().argmax(1)
        logits = model.get_output_embeddings()(hidden[torch.arange(len(some)), at])
        said += (logits[:, yes] > logits[:, no]).tolist()
    return said


def summary(rows: Sequence[Example], said: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with an interval that draws sentences, not examples; the share of the majority."""
    right = np.array([x.truth == one for x, one in zip(rows, said, strict=True)], dtype=float)
    truth = np.array([x.truth for x in rows], dtype=float)
    major = float(max(truth.mean(), 1 - truth.mean()))
    by_sentence: dict[str, list[int]] = {}
    for i, one in enumerate(rows):
        by_sentence.setdefault(one.presentation, []).append(i)
    return {"majority": major, "yes": float(np.mean(said)), **interval(right, by_sentence)}


def interval(right: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Mean of `right`, and its 95 % bootstrap interval over whole groups."""
    sums = np.array([right[[*members]].sum() for members in groups.values()])
    sizes = np.array([len(members) for members in groups.values()])
    draw = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.quantile(sums[draw].sum(1) / sizes[draw].sum(1), [0.025, 0.975])
    return {
        "examples": len(right), "sentences": len(sums), "accuracy": float(right.mean()),
        "low": float(low), "high": float(high),
    }  # fmt: skip
