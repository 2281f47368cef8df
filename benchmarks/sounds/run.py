"""Ask a model that listens about sounds, with every method.

    python -m benchmarks.sounds.run            # both splits → results.json, README.md
    python -m benchmarks.sounds.run --report   # README.md from results.json alone

Needs the model that `python -m recipes.sounds.build` made. All settings answer the same questions,
greedily. A run that was stopped goes on from the answers in the ignored `build/sounds/runs/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.accuracy.run import RATIOS, tower_once
from benchmarks.accuracy.store import MARGIN
from benchmarks.real.run import SEEDS, by_family, packed
from benchmarks.sounds.page import PAGE, RESULTS, write_page
from recipes.sounds.build import FOLDER
from recipes.sounds.items import items
from recipes.sounds.questions import FAMILIES
from recipes.tiny.evaluate import blind_guess
from tokencomp.cli import one_message
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


def main() -> None:
    parser = publishing.parser(__doc__, RESULTS)
    parser.add_argument("--model", type=Path, default=FOLDER / "model")
    parser.add_argument("--per-family", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if not args.report:
        publish(args)
    print(write_page(args.out, PAGE if args.out == RESULTS else args.out.with_suffix(".md")))


def publish(args: argparse.Namespace) -> None:
    """Ask, and write the result file."""
    from recipes.sounds.model import load

    facts = publishing.published_from(args.out, args.allow_dirty)
    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    training = json.loads((args.model / "training.json").read_text())
    results = answer(model, processor, args.per_family, args.batch, args.runs, settings())
    about = {**publishing.environment(), **facts}
    publishing.write(args.out, {"about": about, "training": training, **results})


if __name__ == "__main__":
    with one_message():
        main()
