"""Ask a model that listens about sounds, with every method.

    python -m benchmarks.sounds.run            # both splits → results.json, README.md
    python -m benchmarks.sounds.run --report   # README.md from results.json alone

Needs the model that `python -m recipes.sounds.build` made. All settings answer the same questions,
greedily. A run that was stopped goes on from the answers in the ignored `build/sounds/runs/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.run import RATIOS, tower_once
from benchmarks.accuracy.store import MARGIN
from benchmarks.experiment import Experiment
from benchmarks.real.run import SEEDS, by_family, packed
from benchmarks.sounds.page import data, page
from recipes.sounds.build import FOLDER
from recipes.sounds.items import items
from recipes.sounds.questions import FAMILIES
from recipes.tiny.evaluate import blind_guess
from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import DOWNSCALE, MERGE, RANDOM, Setting

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("uniform", {}),
    (DOWNSCALE, {}),
    ("uniform", {MERGE: True}),
    ("auto", {}),
    ("condiv", {}),
    ("condiv", {"power": 0.35}),
    ("kcenter", {}),
    ("kcenter", {MERGE: True}),
    ("scope", {"saliency": "none", MERGE: True}),
    ("fusion", {}),
    ("bipartite", {}),
    ("divprune", {}),
    ("cdpruner", {}),
    ("fastv", {}),
]
"""Many others read the grid of a picture, or the attention of a tower with a class token."""


def settings(ratios: tuple[float, ...] = RATIOS) -> list[Setting]:
    """The full model, `random` under three seeds, and the methods."""
    random: list[tuple[str, dict[str, Any]]] = [(RANDOM, {"seed": seed}) for seed in SEEDS]
    return [Setting(), *(Setting(name, r, o) for name, o in random + METHODS for r in ratios)]


def answer(
    model: Any, processor: Any, per_family: int, batch: int, runs: Path, chosen: list[Setting]
) -> dict[str, Any]:
    """The content of a result file, without provenance.

    Both splits are asked under all settings: choices are made on the validation questions. A family
    counts as learned where the full model is 25 points above a blind guess on these.
    """
    asked = {split: [*items(split, per_family)] for split in ("validation", "test")}
    how: dict[str, Any] = {"batch_size": batch, "max_new_tokens": 4, "name": "tiny-qwen2-audio"}
    guess = {split: blind_guess(some) for split, some in asked.items()}
    out: dict[str, Any] = {"scores": {}, "blind": guess}
    learned: list[str] = []
    for split, some in asked.items():
        with tower_once(model):
            examples = [one.example() for one in some]
            plain = sweep(model, processor, examples, [Setting()], runs / split, **how)[Setting()]
            out["scores"][split] = scores = by_family(plain)
            if split == "validation":
                learned = [f for f in FAMILIES if scores[f] - guess[split][f] >= MARGIN]
            if not learned:
                raise OptionError("the model has learned no family, so methods can lose nothing.")
            known = [e for e in examples if e.family in learned]
            done = sweep(model, processor, known, chosen, runs / f"{split}-all", **how)
            out[split] = packed(done)
    identity = plain.manifest["identity"]
    about = {key: identity[key] for key in ("weights", "dtype", "seed")}
    return {"per_family": per_family, "learned": learned, "identity": about, **out}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All questions of both splits."""
    from recipes.sounds.model import load

    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    training = json.loads((args.model / "training.json").read_text())
    found = answer(model, processor, args.per_family, args.batch, args.runs, settings())
    yield {"training": training, **found}


OPTIONS = {
    "model": FOLDER / "model",
    "per_family": 100,
    "batch": 25,
    "runs": FOLDER / "runs",
    "threads": torch.get_num_threads(),
}
EXPERIMENT = Experiment("sounds/results", measure, page, data, OPTIONS, readme=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
