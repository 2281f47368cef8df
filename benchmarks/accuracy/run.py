"""Every reducer × ratio × packaged model on ShapesQA: run, tabulate, plot.

    python benchmarks/accuracy/run.py                       # test split → results/, README.md
    python benchmarks/accuracy/run.py --split validation    # for choosing (see choose.py)
    python benchmarks/accuracy/run.py --reducers downscale  # asks that again, the rest stays
    python benchmarks/accuracy/run.py --reducers condiv --per-family 5 --out try

Every setting answers the same items, greedily, through real JPEG and mp4 files, the processor and
`generate`. Answers are added to those in `results/` (see results.py), from which tables and plots
are made; a run of other items needs an --out of its own. A run that was stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, Results, collected, merged

from tokencomp import available_reducers, make_reducer
from tokencomp.adapters.base import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError, TokenCompError, UnknownNameError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import DOWNSCALE, INPUT_BASELINES, Setting
from tokencomp.inputs.questions import shapesqa
from tokencomp.shapesqa.items import items
from tokencomp.shapesqa.questions import FAMILIES
from tokencomp.tokens import TOWER_SIGNALS
from tokencomp.trained.cards import model_facts
from tokencomp.zoo import available_models, load

RATIOS = (0.5, 0.75, 0.9, 0.95)
BASELINES = ("random", "uniform", DOWNSCALE)
TOWERS = ("visual", "vision_tower", "vision_model")
LEFT_OUT = ("oracle", "ccam")  # one needs the answer, one always gives as many tokens
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "cdpruner": ({}, {"relevance": "attention"}),
    "pool": ({}, {"stride": 1.0}),
}


def usable(model: Any, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Reducers that can run on `model`, and why the others cannot."""
    facts = model_facts(adapter_for(model))
    ready, refused = [], {}
    for name in names:
        try:
            if name not in INPUT_BASELINES:
                make_reducer(name).bind(facts)
            ready.append(name)
        except UnknownNameError:
            raise
        except TokenCompError as error:
            refused[name] = str(error)
    return ready, refused


def settings(names: Iterable[str], ratios: Iterable[float]) -> list[Setting]:
    """The full model, then every named method at every ratio."""
    ways = [(name, options) for name in names for options in VARIANTS.get(name, ({},))]
    return [Setting(), *(Setting(n, r, o) for (n, o), r in itertools.product(ways, ratios))]


@contextlib.contextmanager
def tower_once(model: torch.nn.Module) -> Iterator[None]:
    """Run the vision tower once per batch: its input is the same memory under every setting."""
    tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in TOWERS)
    run = tower.forward
    last: list[Any] = []

    def forward(pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key = (pixels.data_ptr(), pixels.shape)
        if not last or last[0] != key:
            last[:] = [key, run(pixels, *args, **kwargs), pixels]  # held, so that it stays there
        return copy.copy(last[1])  # the caller writes into it

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def watches_tower(setting: Setting) -> bool:
    """Whether the reducer looks into the vision tower, which then has to run."""
    if not setting.compresses:
        return False
    return bool(make_reducer(setting.reducer, **setting.options).needs & TOWER_SIGNALS)


def check_items(folder: Path, split: str, ids: Iterable[str]) -> None:
    """Raise `OptionError` if `folder` has answers to other items, before anything is asked."""
    if not (folder / f"{split}.json").exists():
        return
    known, asked = {r["id"] for r in Results.read(folder, split).rows}, set(ids)
    if known != asked:
        raise OptionError(
            f"{folder / split}.jsonl has answers to {len(known)} other items than the {len(asked)} "
            "asked now. Ask the same (--per-family, --families, --start), or give another folder "
            "with --out."
        )


def answer_all(name: str, split: str, wanted: list[Setting], args: argparse.Namespace) -> None:
    """Ask one model everything, and add the answers to its results.

    Raises
    ------
    OptionError
        The results there are of other items, or of another model.
    """
    folder, where = args.out / name, args.out / "runs" / name / split
    asked = list(items(split, args.per_family, tuple(args.families), args.start))
    check_items(folder, split, (item.id for item in asked))
    examples = shapesqa(asked, args.out / "media" / split)
    model, processor = load(name)
    how = {"batch_size": args.batch, "name": name}
    groups = [[s for s in wanted if watches_tower(s) is watches] for watches in (False, True)]
    with tower_once(model):
        runs = sweep(model, processor, examples, groups[0], where, **how)
    if groups[1]:
        runs |= sweep(model, processor, examples, groups[1], where, **how)
    found = collected(runs, name, split)
    if (folder / f"{split}.json").exists():
        found = merged(Results.read(folder, split), found)
    found.write(folder)
    shutil.rmtree(where)  # a later run asks anew


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}; allowed: 0, 1, 2, ...")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=available_models())
    parser.add_argument(
        "--reducers", nargs="+", help="default: baselines, and all that can run at any ratio"
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--per-family", type=int, default=60)
    parser.add_argument(
        "--start", type=_count, default=0, help="questions of a family to pass over"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    others = [n for n in available_reducers() if n not in (*BASELINES, *LEFT_OUT)]
    names = args.reducers or [*BASELINES, *others]
    for name in args.models:
        ready, refused = usable(load(name)[0], names)
        for reducer, why in refused.items():
            print(f"{name}: left out {reducer}: {why}")
        answer_all(name, args.split, settings(ready, args.ratios), args)
    if args.split == "test":
        from report import write_report

        print(write_report(args.out))


if __name__ == "__main__":
    with one_message():
        main()
