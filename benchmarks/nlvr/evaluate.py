"""What a trained model answers to NLVR, in full and with every method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.accuracy.packed import pack
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
BATCH = 165

Batches = list[dict[str, Any]]


def ask(corpus: Path, weights: Path, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Facts of the training, and the answers of the full model and of every method.

    `sentences` has, for every example of a split, the number of its sentence; `right` the packed
    bits of right answers, of methods for `ASKED`, one split after the other.

    Parameters
    ----------
    corpus
        The folder `nlvr` of the repository lil-lab/nlvr.
    weights
        Folder of the training.
    """
    torch.set_num_threads(1)
    training = reached(corpus, weights, seed)
    trainer, _ = trainer_of(corpus, weights, seed)
    model = AutoModelForImageTextToText.from_pretrained(weights / "model", dtype=torch.float32)
    rows = {split: examples(corpus, split) for split in SPLITS}
    asked = {split: batches(trainer, some) for split, some in rows.items()}
    splits = {split: _split(model, rows[split], asked[split]) for split in SPLITS}
    yield {"training": training, "splits": splits}
    both = [one for split in ASKED for one in rows[split]]
    said, refused = methods(model, [batch for split in ASKED for batch in asked[split]])
    for ratio, size in SMALLER.items():
        smaller = [batch for split in ASKED for batch in batches(trainer, rows[split], size)]
        said[Setting(DOWNSCALE, ratio)] = answers(model, smaller)
    found = [
        {"label": s.label, "reducer": s.reducer, "ratio": s.ratio, "right": right(both, some)}
        for s, some in said.items()
    ]
    yield {"training": training, "splits": splits, "methods": found, "refused": refused}


def _split(model: Any, rows: Sequence[Example], asked: Batches) -> dict[str, Any]:
    """The sentences and true labels of a split, and what the full model answers."""
    sentences = [one.presentation for one in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(sentences))}
    return {
        "examples": len(rows),
        "true": sum(one.truth for one in rows),
        "right": right(rows, answers(model, asked)),
        "sentences": [numbers[name] for name in sentences],
    }


def right(rows: Sequence[Example], said: Sequence[bool]) -> str:
    """Packed bits of the right answers."""
    return pack([one.truth == yes for one, yes in zip(rows, said, strict=True)])


def batches(trainer: NlvrTrainer, rows: Sequence[Example], size: tuple[int, int] = SIZE) -> Batches:
    """Inputs of the model: the picture in the first order of the boxes, then the sentence."""
    prefix, _ = trainer.packer.prefix("image", (1, size[1], size[0]))
    config = trainer.model.config
    made = []
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        texts = [[*prefix, *trainer.packer.ids(one.prompt)] for one in some]
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        frames = np.stack([np.asarray(picture(one.pictures[0], size)) for one in some])
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            **trainer.family.pixels(torch.as_tensor(frames[:, None]), "image"),
            "answers": [trainer.packer.ids(ANSWERS[truth])[0] for truth in (True, False)],
        }
        made.append(inputs)
    return made


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


def methods(model: Any, asked: Batches) -> tuple[dict[Setting, list[bool]], dict[str, str]]:
    """The answers with every method at every ratio; why other methods were not asked."""
    reducers = [Setting(name, r) for name in available_reducers() for r in RATIOS]
    random = [Setting(RANDOM, r, {"seed": seed}) for seed in (1, 2) for r in RATIOS]
    chosen, refused = usable(model, [*reducers, *random])
    watching = [s for s in chosen if watches_tower(s) or s.repeats]
    with tower_once(model):
        said = all_answers(model, asked, [s for s in chosen if s not in watching])
    return said | all_answers(model, asked, watching), refused


def all_answers(model: Any, asked: Batches, chosen: Sequence[Setting]) -> dict[Setting, list[bool]]:
    """The answers with every setting, batch by batch."""
    said: dict[Setting, list[bool]] = {setting: [] for setting in chosen}
    for number, batch in enumerate(asked):
        for setting in chosen:
            with apply(model, setting) if setting.active else contextlib.nullcontext():
                said[setting] += answers(model, [batch])
        print(f"batch {number + 1} of {len(asked)}, {len(chosen)} settings", flush=True)
    return said
