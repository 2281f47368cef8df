"""Ask the model of this benchmark about photographs and words, with every method.

    python -m benchmarks.real.run                    # test split → results.json, README.md
    python -m benchmarks.real.run --per-family 150   # more questions
    python -m benchmarks.real.run --pictures         # draws what the default lost in that run
    python -m benchmarks.real.run --report           # README.md from results.json alone

Needs the model that `python -m recipes.photographs.build` made. All settings answer the same
questions, greedily. A run that was stopped goes on from the answers in the ignored folder
`build/real/runs/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.run import tower_once
from benchmarks.accuracy.store import MARGIN
from benchmarks.experiment import Experiment
from benchmarks.gpu.contribution import label_of, row_of
from benchmarks.real.page import page, records
from recipes.photographs.build import FOLDER
from recipes.photographs.items import LETTERS, StampItem, item, items
from recipes.photographs.questions import FAMILIES
from recipes.photographs.scenes import Library
from recipes.photographs.sources import TUXPAINT, Photos
from recipes.tiny.evaluate import blind_guess
from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, FULL, MERGE, RANDOM, Setting
from tokencomp.inputs.questions import Example
from tokencomp.pages.lost import LostItem, draw_lost

RATIOS = (0.5, 0.75, 0.9)
METHODS = ("uniform", DOWNSCALE, "auto", "scope", "divprune", "cdpruner", "bipartite", "fastv")
"""Many others read the attention of the tower, which this one has not."""
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "auto": ({}, {MERGE: False}),
    "scope": ({"saliency": "none", MERGE: True},),
}
SEEDS = (0, 1, 2)
LOST_RATIO = 0.75
LETTERS_START = 50_000  # index of the first item that is asked with letters


Pairs = dict[str, list[tuple[Any, Example]]]
"""By split: the items of a benchmark, each with its question for `tokencomp.evaluation`."""


def item_examples(library: Library, split: str, per_family: int) -> list[tuple[StampItem, Example]]:
    """Items of all families in words; then as many with lettered options, of all families."""
    out = [(one, one.example()) for one in items(library, split, per_family)]
    names = [*FAMILIES]
    for k in range(per_family):
        one = item(library, split, names[k % len(names)], LETTERS_START + k // len(names))
        out.append((one, one.lettered(f"{split}-{LETTERS}-{k:05d}")))
    return out


def settings(methods: Iterable[str], ratios: Sequence[float]) -> list[Setting]:
    """The full model; `random` under three seeds; the methods, with their variants."""
    random = [Setting(RANDOM, ratio, {"seed": seed}) for ratio in ratios for seed in SEEDS]
    variants = [(name, options) for name in methods for options in VARIANTS.get(name, ({},))]
    return [Setting(), *random, *(Setting(n, r, o) for n, o in variants for r in ratios)]


def blind(pairs: Iterable[tuple[Any, Example]]) -> dict[str, float]:
    """Score of a model that sees nothing, by family; the letters are as good as four options."""
    pairs = list(pairs)
    plain = blind_guess([one for one, example in pairs if example.family != LETTERS])
    lettered = [1 / len(one.options) for one, example in pairs if example.family == LETTERS]
    return {**plain, LETTERS: sum(lettered) / len(lettered)} if lettered else plain


def by_family(run: EvalRun) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for record in run.answered:
        scores.setdefault(record["family"], []).append(float(record["correct"]))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def packed(runs: dict[Setting, EvalRun], frames: int = 1) -> dict[str, Any]:
    """Rows of cost, and one bit per question and setting; pictures count as one frame."""
    for run in runs.values():
        run.manifest["identity"]["frames"] = frames
    labelled = {label_of(run): run for run in runs.values()}
    failed = [f"{label}: {run.failed[0]['error']}" for label, run in labelled.items() if run.failed]
    if failed:
        raise OptionError(f"not all questions were answered. {failed[0]}")
    rows = [row_of(label, run) for label, run in labelled.items()]
    return {"rows": rows, "answers": PackedAnswers.of(labelled, FULL).to_json()}


def answer(
    model: Any, processor: Any, pairs: Pairs, args: argparse.Namespace, runs: Path
) -> dict[str, Any]:
    """The content of a result file, without provenance.

    `pairs` has the items of both splits with their questions; of clips, `args.frames` frames are
    shown. Families count as learned where the full model is 25 points above a blind guess on the
    validation split, so that nothing is chosen on test questions. Of the others, only the full
    model is asked: there is nothing that a method could lose.
    """

    def asks(split: str, chosen: list[Setting], families: Iterable[str]) -> dict[Setting, EvalRun]:
        examples = [e for _, e in pairs[split] if e.family in families]
        how = {"batch_size": args.batch, "max_new_tokens": 4, "frames": args.frames}
        with tower_once(model):  # no method reads signals of this tower
            return sweep(
                model, processor, examples, chosen, runs / split, name="real-fastvlm", **how
            )

    plain = Setting()
    everything = [*dict.fromkeys(example.family for _, example in pairs["test"])]
    scores = {split: by_family(asks(split, [plain], everything)[plain]) for split in pairs}
    guess = {split: blind(some) for split, some in pairs.items()}
    margins = {f: score - guess["validation"][f] for f, score in scores["validation"].items()}
    learned = [family for family, margin in margins.items() if margin >= MARGIN]
    chosen = settings(args.methods, args.ratios)
    done = asks("test", chosen if learned else [plain], learned or everything)
    manifest = next(iter(done.values())).manifest
    return {
        "per_family": args.per_family,
        "learned": learned,
        "scores": scores,
        "blind": guess,
        "deviation": {
            s.label: r.manifest["deviation"] for s, r in done.items() if r.manifest["deviation"]
        },
        "identity": {k: manifest["identity"][k] for k in ("weights", "dtype", "seed")},
        **packed(done, args.frames),
    }


def draw(
    model: Any, processor: Any, library: Library, args: argparse.Namespace, runs: Path
) -> list[LostItem]:
    """Draw what `auto` kept of questions that it lost, with and without merging.

    The first lost question of every family is drawn. The pictures come to the ignored folder of
    the run: they show photographs whose licence is not that of this repository.
    """
    chosen = [Setting("auto", LOST_RATIO, options) for options in VARIANTS["auto"]]
    pairs = item_examples(library, "test", args.per_family)
    drawn = []
    for family in FAMILIES:
        some = {e.id: e for _, e in pairs if e.family == family}
        for setting in chosen:
            run, full = (EvalRun.read(runs / "test" / s.label) for s in (setting, Setting()))
            run = replace(run, setting=setting)
            folder = runs / "lost" / family
            drawn += draw_lost(model, processor, run, full, some, folder, per_kind=1)
    return drawn


OPTIONS: dict[str, Any] = {
    "model": FOLDER / "model",
    "photos": TUXPAINT,
    "methods": list(METHODS),
    "ratios": list(RATIOS),
    "per_family": 60,
    "batch": 16,
    "frames": 1,
    "runs": FOLDER / "runs",
    "threads": torch.get_num_threads(),
    "busy": (False, "other jobs use this machine: leave times out"),
}


def answered(args: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    """What the model says to the items of both splits."""
    model, processor = loaded(args)
    results = answer(model, processor, pairs, args, args.runs)
    if args.busy:
        for row in results["rows"]:
            row["seconds"] = 0.0
    training = json.loads((args.model / "training.json").read_text())
    return {"training": training, **results}


def loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model of this benchmark and its processor."""
    from recipes.photographs.model import load

    torch.set_num_threads(args.threads)
    return load(args.model)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All questions; with `--pictures` none, but drawings of what was lost."""
    library = Photos(args.photos)
    if args.pictures:
        for one in draw(*loaded(args), library, args, args.runs):
            print(f"{one.id}: {one.question} {one.answer}; {one.compressed}: {one.picture}")
        return
    count, splits = args.per_family, ("validation", "test")
    yield answered(args, {split: item_examples(library, split, count) for split in splits})


PICTURES = {"pictures": (False, "draw lost questions; asks none")}
EXPERIMENT = Experiment("real/results", measure, page, records, OPTIONS | PICTURES, readme=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
