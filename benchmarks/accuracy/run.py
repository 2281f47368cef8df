"""Every reducer × ratio × embedded model on ShapesQA: run and tabulate.

    python -m benchmarks.accuracy.run                       # test split → results/, README.md
    python -m benchmarks.accuracy.run --split validation    # for choosing, see studies/choose.py
    python -m benchmarks.accuracy.run --reducers downscale  # runs that again, the rest stays
    python -m benchmarks.accuracy.run --reducers auto --per-family 5 --out try

All settings answer the same questions, greedily, through real JPEG and mp4 files, the processor and
`generate`. Results are merged into those in `results/` (see store.py), from which pages
are made; a run on other questions needs an --out of its own. A run that was stopped continues from
the answers in the ignored folder `runs/`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.accuracy import report
from benchmarks.accuracy.store import LOST, MAIN, RESULTS, Results, add_lost, collected, merged
from benchmarks.accuracy.work import work_parts
from benchmarks.experiment import write
from tokencomp import available_reducers, make_reducer
from tokencomp.cli import one_message
from tokencomp.errors import OptionError, TokenCompError, UnknownNameError
from tokencomp.evaluation.baselines import has_budget
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, INPUT_BASELINES, MERGE, NATIVE, Setting
from tokencomp.inputs.questions import Example
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.pages.lost import LostItem, draw_lost
from tokencomp.patching import check
from tokencomp.zoo import available_models, load
from tokencomp.zoo.shapesqa.difficulty import DIFFICULTIES
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import FRAMES, Item, items
from tokencomp.zoo.shapesqa.questions import FAMILIES

RATIOS = (0.5, 0.75, 0.9, 0.95)
BASELINES = ("random", "uniform", DOWNSCALE)
TOWERS = ("visual", "vision_tower", "vision_model", "audio_tower")
LOST_RATIOS, LOST_PER_KIND, LOST_SIDE = (0.75, 0.9), 2, 128
MODELS = [name for name in available_models() if name != "tiny-qwen3-vl-long"]
"""Embedded models that answer in a word or a letter."""
LEFT_OUT = ("ccam",)  # it always returns the same token count
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "auto": ({}, {MERGE: False}),
    "random": ({}, {"seed": 1}, {"seed": 2}),
    "cdpruner": ({}, {"relevance": "attention"}),
    "pool": ({}, {"stride": 1.0}),
    "scope": ({}, {"saliency": "none"}, {"saliency": "none", MERGE: True}),
    "mmtok": ({}, {"cover": "picture"}),
    "flashvid": ({}, {"event": True}),
    "kcenter": ({}, {MERGE: True}),
    "selector": ({}, {"pick": "mmr"}, {"pick": "mmr", MERGE: True}),
}


def usable(model: Any, grid: Iterable[Setting]) -> tuple[list[Setting], dict[str, str]]:
    """Settings that can run on `model`, and by label why the others cannot."""
    ready, refused = [], {}
    for setting in grid:
        try:
            if setting.active and setting.reducer not in INPUT_BASELINES:
                make_reducer(setting.reducer, **setting.options)
                check(model, setting)
            ready.append(setting)
        except UnknownNameError:
            raise
        except TokenCompError as error:
            refused[setting.label] = str(error)
    return ready, refused


def settings(names: Iterable[str], ratios: Iterable[float]) -> list[Setting]:
    """The full model, then every named method at every ratio."""
    methods = [(name, options) for name in names for options in VARIANTS.get(name, ({},))]
    grid = itertools.product(methods, ratios)
    return [Setting(), *(Setting(n, r, o) for (n, o), r in grid)]


@contextlib.contextmanager
def tower_once(model: torch.nn.Module) -> Iterator[None]:
    """Run the vision tower once per batch: its input is the same under every setting."""
    tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in TOWERS)
    run = tower.forward
    last: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        if not last or last[0].shape != pixels.shape or not torch.equal(last[0], pixels):
            last[:] = [pixels, run(*args, **kwargs)]
        return copy.copy(last[1])  # the caller writes into it

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def watches_tower(setting: Setting) -> bool:
    """Whether the reducer reads signals of the vision tower, which then has to run."""
    if not setting.active:
        return False
    needs = make_reducer(setting.reducer, **setting.options).needs
    return any(signal.source == "tower" for signal in needs)


def ask(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    settings: Iterable[Setting],
    folder: Path,
    **how: Any,
) -> dict[Setting, EvalRun]:
    """Answers under every setting; those that do not read the vision tower share one run of it."""
    plain, watching = ([s for s in settings if watches_tower(s) is w] for w in (False, True))
    with tower_once(model):
        runs = sweep(model, processor, examples, plain, folder, **how)
    if watching:
        runs |= sweep(model, processor, examples, watching, folder, **how)
    return runs


def stored_families(folder: Path, split: str) -> list[str]:
    """Question families of the results in `folder`, which a later run adds to; else all."""
    if not (folder / f"{split}.json").exists():
        return list(FAMILIES)
    return Results.read(folder, split).families


def check_items(folder: Path, split: str, ids: Iterable[str]) -> None:
    """Raise `OptionError` before a run if `folder` has results on other questions."""
    if not (folder / f"{split}.json").exists():
        return
    stored, requested = set(Results.read(folder, split).answers.questions.ids), set(ids)
    if stored != requested:
        raise OptionError(
            f"{folder / split}.json has results on {len(stored)} other questions than the "
            f"{len(requested)} of this run. Choose the same questions (--per-family, --families, "
            "--start), or give another folder with --out."
        )


def questions_of(split: str, families: list[str], args: argparse.Namespace) -> list[Item]:
    """Those of the command line; ids of longer clips say how many frames these have."""
    scenes = {"difficulty": args.difficulty, "frames": args.frames}
    questions = items(split, args.per_family, tuple(families), args.start, **scenes)
    if args.frames == FRAMES:
        return list(questions)
    return [replace(one, id=f"{one.id}-{args.frames}") for one in questions]


def answer_all(
    name: str, split: str, grid: list[Setting], args: argparse.Namespace, facts: dict[str, Any]
) -> None:
    """Run all settings of `grid` on one model, and merge them into its results.

    Parameters
    ----------
    facts
        Of `publishing.published_from`.

    Raises
    ------
    OptionError
        The stored results are of other questions, or of another model.
    """
    folder, unfinished = args.out / name, args.out / "runs" / name / split
    stored = stored_families(folder, split)
    # In the stored order, whatever the command line's: answers are merged by position.
    families = [f for f in dict.fromkeys([*stored, *FAMILIES]) if f in (args.families or stored)]
    questions = questions_of(split, families, args)
    check_items(folder, split, (item.id for item in questions))
    examples = shapesqa(questions, args.out / "media" / split)
    model, processor = load(name)
    options = {"batch_size": args.batch, "frames": args.frames, "name": name}
    runs = ask(model, processor, examples, grid, unfinished, **options)
    for setting, parts in work_parts(model, processor, runs, examples, args.frames).items():
        runs[setting].manifest["work"] = parts
    results = collected(runs, name, split, facts)
    if (folder.parent, name) == (RESULTS, MAIN):  # pictures take much space: one set has to do
        add_lost(results, draw_default(model, processor, runs, examples, folder / LOST))
    if (folder / f"{split}.json").exists():
        results = merged(Results.read(folder, split), results)
    results.write(folder)
    shutil.rmtree(unfinished)  # a later run starts afresh


def draw_default(
    model: Any, processor: Any, runs: dict[Setting, EvalRun], examples: list[Example], folder: Path
) -> dict[str, list[LostItem]]:
    """Draw what the default loses at `LOST_RATIOS`, by a fixed rule; items by label."""
    by_id = {example.id: example for example in examples}
    small = {"per_kind": LOST_PER_KIND, "side": LOST_SIDE}
    return {
        setting.label: draw_lost(model, processor, run, runs[Setting()], by_id, folder, **small)
        for setting, run in runs.items()
        if setting.reducer == DEFAULT_REDUCER
        and setting.ratio in LOST_RATIOS
        and not setting.written_options
    }


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}; allowed: 0, 1, 2, ...")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = publishing.parser(__doc__, RESULTS, report=False)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument(
        "--reducers", nargs="+", help="default: baselines, and all that can run at any ratio"
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--per-family", type=int, default=60)
    parser.add_argument(
        "--start", type=_count, default=0, help="index of the first question of every family"
    )
    parser.add_argument(
        "--families",
        nargs="+",
        choices=FAMILIES,
        help="question families; default those of the model's stored results, else all",
    )
    parser.add_argument(
        "--difficulty",
        choices=DIFFICULTIES,
        default="usual",
        help="of the scenes; hard ones have panning cameras, crowds, backgrounds in the colours of "
        "objects and text over them, and seeds of their own in every split",
    )
    parser.add_argument("--frames", type=int, default=FRAMES, help="of every clip; all are seen")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main() -> None:
    args = arguments().parse_args()
    facts = publishing.published_from(args.out, args.allow_dirty)
    torch.set_num_threads(args.threads)
    methods = [n for n in available_reducers() if n not in (*BASELINES, *LEFT_OUT)]
    for name in args.models:
        model, processor = load(name)
        native = [NATIVE] if has_budget(processor) else []
        names = args.reducers or [*BASELINES, *native, *methods]
        ready, refused = usable(model, settings(dict.fromkeys(names), args.ratios))
        for label, reason in refused.items():
            print(f"{name}: left out {label}: {reason}")
        answer_all(name, args.split, ready, args, facts)
    if args.split == "test":
        print(*write(report.files(args.out.resolve())), sep="\n")


if __name__ == "__main__":
    with one_message():
        main()
