"""What the model of a training run answers to NLVR, in full and with every method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.accuracy.run import tower_once, usable, watches_tower
from recipes.nlvr.build import reached, trainer_of
from recipes.nlvr.corpus import SIZE, Example, examples, picture
from recipes.nlvr.train import ANSWERS, NlvrTrainer
from tokencomp import available_reducers
from tokencomp.evaluation.settings import DOWNSCALE, RANDOM, Setting
from tokencomp.patching import apply

SPLITS = ("dev", "test", "hidden")
ASKED = ("test", "hidden")
"""Splits that every method answers."""
RATIOS = (0.5, 0.9)
SMALLER = {0.5: (11 * 28, 3 * 28), 0.9: (6 * 28, 28)}
"""By ratio: sizes of smaller pictures, of 33 and 6 visual tokens where there are 64."""
BATCH, RESAMPLES = 165, 10_000


def evaluate(corpus: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Facts of the training, and for every split the right answers of the full model.

    If it has learnt NLVR, the right answers of every method as well.
    """
    training = reached(corpus, out, seed)
    trainer, _ = trainer_of(corpus, out, seed)
    model = AutoModelForImageTextToText.from_pretrained(out / "model", dtype=torch.float32)
    rows = {split: examples(corpus, split) for split in SPLITS}
    asked = {split: [*batches(trainer, some)] for split, some in rows.items()}
    splits = {split: summary(some, answers(model, asked[split])) for split, some in rows.items()}
    found = {"training": training, "splits": splits}
    if learnt(splits):
        smaller = {
            Setting(DOWNSCALE, ratio): [
                x for split in ASKED for x in answers(model, batches(trainer, rows[split], size))
            ]
            for ratio, size in SMALLER.items()
        }
        found["methods"] = methods(model, rows, asked, smaller)
    return found


def learnt(splits: Mapping[str, Any]) -> bool:
    """Whether the full model is above the majority class on every split, significantly."""
    return all(s["low"] > s["majority"] for s in splits.values())


def batches(
    trainer: NlvrTrainer, rows: Sequence[Example], size: tuple[int, int] = SIZE
) -> Iterable[dict[str, Any]]:
    """Inputs of the model: the picture in the first order of the boxes, then the sentence."""
    prefix, _ = trainer.packer.prefix("image", (1, size[1], size[0]))
    config = trainer.model.config
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        texts = [[*prefix, *trainer.packer.ids(one.prompt)] for one in some]
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        frames = np.stack([np.asarray(picture(one.pictures[0], size)) for one in some])
        yield {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            **trainer.family.pixels(torch.as_tensor(frames[:, None]), "image"),
            "answers": [trainer.packer.ids(ANSWERS[truth])[0] for truth in (True, False)],
        }


@torch.inference_mode()
def answers(model: Any, asked: Iterable[Mapping[str, Any]]) -> list[bool]:
    """Whether "yes" has the larger logit of the two answers."""
    said: list[bool] = []
    for batch in asked:
        inputs = {name: value for name, value in batch.items() if name != "answers"}
        yes, no = batch["answers"]
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        said += (logits[:, yes] > logits[:, no]).tolist()
    return said


def methods(
    model: Any,
    rows: Mapping[str, Sequence[Example]],
    asked: Mapping[str, Sequence[Any]],
    smaller: Mapping[Setting, list[bool]],
) -> dict[str, Any]:
    """Right answers of every method on `ASKED`, both splits as one, at every ratio.

    `smaller` has the answers to smaller pictures. A difference is that to the full model, with an
    interval that draws sentences.
    """
    examples_asked = [one for split in ASKED for one in rows[split]]
    groups = grouped([f"{split} {x.presentation}" for split in ASKED for x in rows[split]])
    reducers = [Setting(name, r) for name in available_reducers() for r in RATIOS]
    random = [Setting(RANDOM, r, {"seed": seed}) for seed in (1, 2) for r in RATIOS]
    chosen, refused = usable(model, [Setting(), *reducers, *random])
    watching = [s for s in chosen if watches_tower(s) or s.repeats]
    every = [batch for split in ASKED for batch in asked[split]]
    with tower_once(model):
        said = all_answers(model, every, [s for s in chosen if s not in watching])
    said |= all_answers(model, every, watching) | smaller
    scores = {setting: right(examples_asked, some) for setting, some in said.items()}
    full = scores.pop(Setting())
    found = [
        {"label": s.label, "reducer": s.reducer, "ratio": s.ratio, "accuracy": float(one.mean())}
        | {f"difference_{name}": value for name, value in interval(one - full, groups).items()}
        for s, one in scores.items()
    ]
    return {"examples": len(full), "full": float(full.mean()), "asked": found, "refused": refused}


def all_answers(
    model: Any, asked: Sequence[Mapping[str, Any]], chosen: Sequence[Setting]
) -> dict[Setting, list[bool]]:
    """The answers with every method, batch by batch."""
    said: dict[Setting, list[bool]] = {setting: [] for setting in chosen}
    for number, batch in enumerate(asked):
        for setting in chosen:
            with apply(model, setting) if setting.active else contextlib.nullcontext():
                said[setting] += answers(model, [batch])
        print(f"batch {number + 1} of {len(asked)}, {len(chosen)} settings", flush=True)
    return said


def summary(rows: Sequence[Example], said: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with an interval that draws sentences, not examples; the share of the majority."""
    truth = np.array([x.truth for x in rows], dtype=float)
    major = float(max(truth.mean(), 1 - truth.mean()))
    groups = grouped([one.presentation for one in rows])
    about = {"majority": major, "yes": float(np.mean(said)), "sentences": len(groups)}
    return {**about, "examples": len(rows), **interval(right(rows, said), groups)}


def right(rows: Sequence[Example], said: Sequence[bool]) -> np.ndarray:
    """1.0 for every right answer, 0.0 for others."""
    return np.array([x.truth == one for x, one in zip(rows, said, strict=True)], dtype=float)


def grouped(names: Sequence[str]) -> list[list[int]]:
    """Numbers of the examples of every sentence."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    return [*groups.values()]


def interval(values: np.ndarray, groups: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean of `values`, and its 95 % bootstrap interval over whole groups."""
    sums = np.array([values[[*members]].sum() for members in groups])
    sizes = np.array([len(members) for members in groups])
    draw = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.quantile(sums[draw].sum(1) / sizes[draw].sum(1), [0.025, 0.975])
    return {"accuracy": float(values.mean()), "low": float(low), "high": float(high)}
