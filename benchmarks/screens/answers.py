"""What a tiny model answers about sessions of screens, with and without `delta`, per budget.

    python -m benchmarks.screens.answers            # answers.json, answers.md
    python -m benchmarks.screens.answers --report   # only the page

Needs the three models of `python -m recipes.screens.build` (plain, `--longer` and `--delta`). All
of them answer the same test questions, greedily, one at a time; `--only NAME` asks one of them, so
that they can be asked at the same time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.screens.answers_page import page
from recipes.screens.build import FOLDER
from recipes.screens.questions import FAMILIES, Item, item, place
from tokencomp.inputs.loading import load_folder
from tokencomp.inputs.prompts import build_inputs
from tokencomp.pages.pictures import survival

MODELS = ("full", "longer", "delta")
TRAINING = ("seed", "stages", "finished", "seconds", "training_scores")
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "delta 0": {"reducer": "delta", "threshold": 0},
    "delta 8": {"reducer": "delta", "threshold": 8},
    "budget 18": {"budget": 18},
    "budget 9": {"budget": 9},
    "delta 8, budget 18": {"reducer": "delta", "threshold": 8, "budget": 18},
    "delta 8, budget 9": {"reducer": "delta", "threshold": 8, "budget": 9},
}


@contextmanager
def compressed(model: Any, how: dict[str, Any]) -> Iterator[Any]:
    """The handle of a patch, None for the whole model; undone afterwards."""
    if not how:
        yield None
        return
    handle = tokencomp.patch(model, **how)
    try:
        yield handle
    finally:
        tokencomp.unpatch(model)


def ask(model: Any, processor: Any, question: Item, how: dict[str, Any]) -> dict[str, Any]:
    """One answer, and where the target's cell is kept.

    `kept` is the share of tokens in the last decoder layer; `here` says whether the cell with the
    middle of the widget is kept in the last screenshot, `somewhere` in one that shows the widget
    with the same looks.
    """
    pictures = [Image.fromarray(frame) for frame in question.frames]
    inputs = build_inputs(processor, [pictures], [question.question])
    with compressed(model, how) as handle, torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        masks = _masks(handle, len(pictures))
    text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
        0
    ].strip()
    column, row = place(question.widget)
    shown = [bool(mask[row, column]) for mask in masks[question.widget.since :]]
    return {
        "right": text == question.answer,
        "kept": float(np.mean([mask.mean() for mask in masks])),
        "kept of the last": float(masks[-1].mean()),
        "here": shown[-1],
        "somewhere": any(shown),
    }


def _masks(handle: Any, pictures: int) -> list[np.ndarray]:
    if handle is None:
        return [np.ones((6, 6), bool)] * pictures
    last = survival(handle.stats, len(handle.stats.layers) - 1)
    return [share[0] == 1 for share in last]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one model, setting and family."""
    count = len(records)
    seen = [r for r in records if r["somewhere"]]
    return {
        "questions": count,
        "right": sum(r["right"] for r in records),
        "kept": sum(r["kept"] for r in records) / count,
        "kept of the last": sum(r["kept of the last"] for r in records) / count,
        "here": sum(r["here"] for r in records),
        "somewhere": len(seen),
        "right where kept": sum(r["right"] for r in seen),
    }


def guess(items: list[Item]) -> float:
    """Share that the commonest answer of these very questions gets right: blind, and favoured."""
    answers = [one.answer for one in items]
    return max(answers.count(a) for a in set(answers)) / len(answers)


def answered(folder: Path, asked: dict[str, list[Item]], facts: dict[str, Any]) -> dict[str, Any]:
    """All settings and families of one model; kept beside it, for the page of all models."""
    from tqdm import tqdm

    stored = folder / "answers.json"
    identity = {"per_family": len(next(iter(asked.values()))), **facts}
    if stored.exists() and (known := json.loads(stored.read_text()))["identity"] == identity:
        return known
    model, processor = load_folder(str(folder / "model"))
    rows = []
    for setting, how in SETTINGS.items():
        for family, items in tqdm(asked.items(), f"{folder.name}, {setting}"):
            found = [ask(model, processor, one, how) for one in items]
            row = {"model": folder.name, "setting": setting, "family": family}
            rows.append(row | summary(found))
    trained = json.loads((folder / "model" / "training.json").read_text())
    training = {name: trained[name] for name in TRAINING}
    result = {"identity": identity, "training": training, "rows": rows}
    publishing.write(stored, result)
    return result


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All models, or with `--only` one of them, for a later page."""
    facts = publishing.published_from(args.out, args.allow_dirty)
    torch.set_num_threads(1)
    asked = {f: [item("test", f, k) for k in range(args.per_family)] for f in FAMILIES}
    chosen = [args.only] if args.only else MODELS
    found = {name: answered(args.models / name, asked, facts) for name in chosen}
    if not args.only:
        yield {
            "per_family": args.per_family,
            "blind": {family: guess(items) for family, items in asked.items()},
            "training": {name: one["training"] for name, one in found.items()},
            "rows": [row for one in found.values() for row in one["rows"]],
        }


OPTIONS = {
    "models": (FOLDER, "folder of the three models"),
    "only": (None, "only ask this model, for a later page", MODELS),
    "per_family": 40,
}
EXPERIMENT = Experiment("screens/answers", measure, page, lambda stored: stored["rows"], OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
