"""Ask for long answers under every setting, continue them token by token, and write the page.

    python -m benchmarks.long answer              # → images.json, clips.json
    python -m benchmarks.long forced              # → forced.json
    python -m benchmarks.long page                # → README.md
    python -m benchmarks.long choice              # → choice.md, choice.json
    python -m benchmarks.long answer --split validation --only auto condiv kcenter

A run that was stopped goes on from the answers in the ignored folder `build/long/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.experiment import write
from benchmarks.long import choice, forced
from benchmarks.long.answers import (
    CHOICE_RATIOS,
    KINDS,
    MERGED,
    RATIOS,
    Answers,
    add_answers,
    items_of,
    pack,
    path_of,
)
from benchmarks.long.page import FOLDER, MODEL, files
from tokencomp import zoo
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.loading import load_folder

BUILD = FOLDER.parents[1] / "build" / "long"
PER_FAMILY = {"images": 32, "clips": 40}
FORCED = {"images": 16, "clips": 20}
"""Items of each family that are continued token by token."""
CONTINUED = ("auto", "kcenter", "condiv", "fastv", "uniform")
"""Methods that continue them, and those of `MERGED` that merge."""


def main() -> None:
    parser = publishing.parser(__doc__, FOLDER, report=False)
    parser.add_argument("what", choices=("answer", "forced", "page", "choice"))
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--model", default=MODEL, help="embedded model, or a folder")
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--only", nargs="*", default=[], help="these reducers alone")
    parser.add_argument("--items", type=int, help="per family, for trials")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "answer":
        answer(args)
    elif args.what == "forced":
        write_forced(args)
    else:
        write(choice.files(args.out) if args.what == "choice" else files())


def _loaded(name: str) -> tuple[Any, Any]:
    return load_folder(name) if Path(name).exists() else zoo.load(name)


def answer(args: argparse.Namespace) -> None:
    """Ask, and add to the stored answers."""
    facts = publishing.published_from(args.out, args.allow_dirty)
    loaded = _loaded(args.model)
    for kind in args.kinds:
        path = path_of(args.out, args.split, kind)
        stored = Answers.read(path) if path.exists() else Answers()
        items = items_of(kind, args.split, args.items or PER_FAMILY[kind])
        folder = BUILD / "runs" / f"{args.split}-{kind}"
        ratios = RATIOS if args.split == "test" else CHOICE_RATIOS
        add_answers(stored, loaded, kind, items, folder, args.batch, facts, args.only, ratios)
        stored.write(path)


def write_forced(args: argparse.Namespace) -> None:
    """Continue the full model's stored answers to the first items of every family."""
    facts = publishing.published_from(args.out, args.allow_dirty)
    stored = Answers.of(args.out, args.split)
    model, processor = _loaded(args.model)
    held = {}
    settings = [Setting(name, ratio) for name in CONTINUED for ratio in RATIOS]
    settings += [Setting(name, ratio, {"merge": True}) for name in MERGED for ratio in RATIOS]
    for kind in args.kinds:
        items = items_of(kind, args.split, args.items or FORCED[kind])
        said = dict(zip(stored.ids[kind], stored.texts[kind]["full"], strict=True))
        texts = [said[one.id] for one in items]
        families = [one.family for one in items]
        held[kind] = {
            "facts": [
                forced.facts_of(processor, family, text)
                for family, text in zip(families, texts, strict=True)
            ],
            "settings": forced.agreement(model, processor, items, texts, settings),
            "readers": forced.readers(model, processor, items, texts, RATIOS),
        }
    about = [{**publishing.environment(), **facts}]
    publishing.write(args.out / "forced.json", {"about": about, "packed": pack(held)})


if __name__ == "__main__":
    with one_message():
        main()
