"""Speed of the first token against accuracy, over tower ratios, places of the stage and ratios.

    python -m benchmarks.frontier answers                  # validation questions
    python -m benchmarks.frontier clock --rounds 2         # on a quiet machine, 25 minutes
    python -m benchmarks.frontier answers --split test     # after both: frontier and baselines
    python -m benchmarks.frontier page

writes clock.json, answers.json and README.md. The settings, and the rule that chooses one, are
in `page.py`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokencomp
from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers, stored_sets
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.tower import DEEP_IMAGES, DEEP_VIDEOS
from benchmarks.experiment import write
from benchmarks.frontier.page import FULL, HERE, Measured, Point, answers_of, files, points
from benchmarks.models.tower_parts import UNIT, build, clock_of, qwen_inputs
from benchmarks.publishing import environment
from tokencomp.cli import one_message
from tokencomp.evaluation import timing
from tokencomp.evaluation.runner import sweep
from tokencomp.inputs.loading import load_model
from tokencomp.trained.cards import weights_hash
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

MODEL = "tiny-qwen3-vl"
FAMILIES = {"image": DEEP_IMAGES, "video": DEEP_VIDEOS}
AT_ONCE = 6
"""Settings that are answered and stored together."""


def answer(modality: str, points: Sequence[Point], args: argparse.Namespace, path: Path) -> None:
    """Answer the questions under every setting that the file lacks."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    entries, name = answers_of(path), f"{modality}, {args.split}"
    model, processor = load_model(MODEL, device="cpu")
    blocks = model.config.vision_config.depth
    chosen = list(items(args.split, args.per_family, FAMILIES[modality]))
    source = shapesqa(chosen, ACCURACY / "results" / "media" / args.split)
    done = entries[name]["answers"].correct if name in entries else {}
    missing = [p for p in points if p.key not in done]
    for first in range(0, len(missing), AT_ONCE):
        some = missing[first : first + AT_ONCE]
        settings = [p.setting(blocks) for p in some]
        how = {"batch_size": args.batch, "progress": name, "name": MODEL}
        runs = sweep(model, processor, source, settings, None, **how)
        keyed = {p.key: runs[s] for p, s in zip(some, settings, strict=True)}
        new = PackedAnswers.of(keyed, None)
        before = entries.get(name)
        entries[name] = {
            "model": MODEL, "weights": weights_hash(model),
            "provenance": {**environment(), **facts},
            "answers": before["answers"].joined(new) if before else new,
        }  # fmt: skip
        publishing.write(path, stored_sets(entries))


PART = 4
"""A quarter of the blocks of tower and decoder, at full width."""
SIDES = {"image": 32 * UNIT, "video": 224}
FRAMES = {"image": 0, "video": 32}


class FirstToken:
    """Seconds of one prefill, tower included, on one CPU thread (processor time)."""

    def __init__(self, modality: str, model: Any) -> None:
        self.modality, self.model = modality, model
        self.clock = clock_of("cpu")
        self.prompts: dict[int, dict[str, Any]] = {}

    def prompt(self, point: Point) -> dict[str, Any]:
        """Inputs of the processor for a picture or clip of the size of a setting."""
        side = SIDES[self.modality]
        if point.smaller:
            side = max(1, round(side / UNIT * math.sqrt(1 - point.ratio))) * UNIT
        if side not in self.prompts:
            args = argparse.Namespace(threads=1, dtype="float32", device="cpu")
            self.prompts[side] = qwen_inputs(self.model, FRAMES[self.modality], side, args)
        return self.prompts[side]

    def seconds(self, point: Point) -> float:
        """Time from pixels to the logits of the first token."""
        prompt = self.prompt(point)
        patched = point.ratio > 0 and not point.smaller
        plan = point.plan(self.model.config.vision_config.depth)
        context = tokencomp.patch(self.model, plan=plan) if patched else torch.no_grad()
        with context, torch.inference_mode():
            prefill = partial(self.model, **prompt["inputs"], use_cache=True, logits_to_keep=1)
            return timing.seconds(prefill, self.clock) + float(prompt["preprocess"])


def time_first_token(
    modality: str, points: Sequence[Point], args: argparse.Namespace, path: Path
) -> None:
    """Time every setting `args.rounds` times; the full model between every eight settings."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    torch.set_num_threads(1)
    shape = argparse.Namespace(part=PART, dtype="float32", device="cpu", attention="sdpa")
    timer = FirstToken(modality, build("qwen2-vl-2b", shape))
    timer.seconds(Point(0.9, smaller=True))  # warm
    stored = json.loads(path.read_text()) if path.exists() else {}
    settings = [p for p in points if p != FULL]
    times: dict[str, list[float]] = {}
    for number in range(args.rounds):
        order = settings if number % 2 == 0 else settings[::-1]
        for first in range(0, len(order), 8):
            full = timer.seconds(FULL)
            for point in order[first : first + 8]:
                times.setdefault(point.key, []).append(full / timer.seconds(point))
            print(f"{modality}, round {number + 1}: {first + 8} settings, full {full:.1f} s")
    stored[modality] = {"provenance": {**environment(), **facts}, "speedups": times}
    publishing.write(path, stored)


def main() -> None:
    parser = publishing.parser(__doc__, HERE, "--output", report=False)
    parser.add_argument("part", choices=("answers", "clock", "page"))
    parser.add_argument("--modalities", nargs="+", choices=list(SIDES), default=["image", "video"])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--per-family", type=int, default=40)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    book, times = args.output / "answers.json", args.output / "clock.json"
    for modality in args.modalities if args.part != "page" else ():
        if args.part == "clock":
            time_first_token(modality, points(), args, times)
            continue
        asked = points()
        if args.split == "test":
            measured = Measured(modality, json.loads(times.read_text()), answers_of(book))
            asked = measured.tested()
        answer(modality, asked, args, book)
    if args.part == "page":
        write(files(args.output))


if __name__ == "__main__":
    with one_message():
        main()
