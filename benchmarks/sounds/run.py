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
from benchmarks.accuracy.store import MARGIN, as_results
from benchmarks.accuracy.studies.ranking import Candidate, answered, choice_table, rank, title
from benchmarks.experiment import Experiment
from benchmarks.publishing import provenance
from benchmarks.real.run import (
    SEEDS,
    by_family,
    families_table,
    overview,
    packed,
    read_runs,
    records,
)
from recipes.sounds.build import FOLDER
from recipes.sounds.items import items
from recipes.sounds.model import TOKENS
from recipes.sounds.questions import FAMILIES
from recipes.sounds.scenes import COUNTS, NAMES, SECONDS
from recipes.tiny.evaluate import blind_guess
from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import DOWNSCALE, FULL, MERGE, RANDOM, Setting
from tokencomp.reducers.registry import make_reducer

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


HEAD = f"""# What happens to sounds?

A tiny `Qwen2AudioForConditionalGeneration`, trained from scratch, answers questions about clips of
{SECONDS:.0f} seconds with {COUNTS[0]} to {COUNTS[1]} sounds of {len(NAMES)} kinds: which are
heard, how many, when, and in which order. A clip becomes {TOKENS} tokens, 25 per second.
"""
BELOW = """
## How to read this

Most neighbouring tokens resemble each other, and a short sound has three or four tokens. Nothing
carries over to speech or to a 7B model. One training with one seed. `downscale` plays the clip
faster, and so higher: the model has never heard such clips.

```bash
python -m recipes.sounds.build   # goes on where it stopped
python -m benchmarks.sounds.run  # makes this page
```
"""


def page(results: dict[str, Any]) -> str:
    """Markdown of a result file."""
    training = results["training"]
    stages = ", ".join(f"{name} {steps}" for name, steps in training["stages"].items())
    end = "to its end" if training["finished"] else "stopped early"
    run = f"""
## Runs

- Model: {provenance(training)}. Steps: {stages}, {end}, {training["seconds"]} s;
  {training["parameters"] / 1e6:.1f} M parameters.
- Answers: {results["per_family"]} questions of each family and split; greedy decoding in
  {results["identity"]["dtype"]}.
"""
    runs = read_runs(results["test"])
    asked = (
        f"\nRight answers to {len(runs[0].records)} test questions of the learned families. All "
        "methods, intervals, families, FLOPs and KV bytes: [test](../README.md#tables-as-csv), "
        "[validation](../README.md#tables-as-csv).\n"
    )
    choice = choice_lines(results)
    return "\n".join([HEAD, overview(runs), asked, families_table(results), *choice, run, BELOW])


def data(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the CSV files of both splits."""
    return {split: records(results[split]) for split in ("validation", "test")}


NO_CANDIDATES = (FULL, RANDOM, DOWNSCALE, "auto")
CHOICE = """
## Candidates for the default

Retention on the validation questions, by the
[rule for images and videos](../../docs/decisions/0001-default-reducer.md): of the candidates that
are tied with the best, the one with most points to spare above the bars wins.
"""


def choice_lines(results: dict[str, Any]) -> list[str]:
    """The section of the page; empty where a candidate lacks a ratio."""
    weights, run = results["identity"]["weights"], results["environment"]
    asked = as_results(results["validation"], weights, run)
    every = [candidate(row) for row in results["validation"]["rows"]]
    unique = [c for i, c in enumerate(every) if c not in every[:i] and c[0] not in NO_CANDIDATES]
    if not all(answered([asked], one) for one in unique):
        return []
    rows, keeping = rank([asked], unique), [one for one in unique if not merges(one)]
    best = chosen(rank([asked], keeping))
    return [
        CHOICE,
        choice_table(rows, best, [asked]),
        f"\nBy the rule: **{title(chosen(rows))}**. Of the candidates that keep tokens "
        f"unchanged: **{title(best)}**.",
    ]


def candidate(row: dict[str, Any]) -> Candidate:
    return row["reducer"], row["options"]


def merges(one: Candidate) -> bool:
    name, options = one
    return options.get(MERGE) is True or make_reducer(name).traits.merges


def chosen(rows: list[dict[str, Any]]) -> Candidate:
    """What the rule names."""
    return candidate(max((row for row in rows if row["tied"]), key=lambda row: row["spare"]))


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
