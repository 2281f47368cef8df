"""`speedup=`: what it keeps and how much sooner the first token comes, against smaller pictures.

    python -m benchmarks.frontier.speedup answers                  # validation questions
    python -m benchmarks.frontier.speedup clock
    python -m benchmarks.frontier.speedup answers --split test     # once the paths are fixed
    python -m benchmarks.frontier.speedup page

writes speedup.json and speedup.md.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokencomp
from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers, read_sets, stored_sets
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.tower import DEEP_IMAGES, DEEP_VIDEOS, IMAGES, VIDEOS
from benchmarks.experiment import Files, write
from benchmarks.frontier.page import HERE
from benchmarks.models.tower_parts import UNIT, build, clock_of, qwen_inputs
from benchmarks.publishing import environment
from tokencomp.cli import one_message
from tokencomp.evaluation import timing
from tokencomp.evaluation.metrics import retention
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import DOWNSCALE, Setting
from tokencomp.inputs.loading import load_model
from tokencomp.trained.cards import weights_hash
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

ANSWERS, CLOCK = HERE / "speedup-answers.json", HERE / "speedup-clock.json"
QUESTIONS = {
    "tiny-qwen3-vl": {"image": DEEP_IMAGES, "video": DEEP_VIDEOS},
    "tiny-qwen2-vl": {"image": IMAGES, "video": VIDEOS},
    "tiny-qwen3-5": {"image": IMAGES, "video": VIDEOS},
    "tiny-llava-onevision": {"image": IMAGES, "video": VIDEOS},
    "tiny-vila": {"image": IMAGES, "video": VIDEOS},
}
SPEEDUPS = (1.5, 2.0, 3.0)
SMALLER = {"image": (0.45, 0.6), "video": (0.54, 0.66)}
"""Pixels gone for about 2 and 3 times the speed of the first token (README.md)."""
SETTINGS: dict[str, list[Setting]] = {
    modality: [
        Setting(),
        *(Setting("auto", speedup=speedup) for speedup in SPEEDUPS),
        Setting("auto", 0.75),
        *(Setting(DOWNSCALE, ratio) for ratio in SMALLER[modality]),
    ]
    for modality in SMALLER
}
CASES = {"image of 1,024 tokens": (0, 32), "clip of 32 frames": (32, 8), "image of 4,096": (0, 64)}
PART = 4  # a quarter of the blocks of tower and decoder, at full width


def answer(name: str, modality: str, args: argparse.Namespace) -> None:
    facts = publishing.published_from(args.output, args.allow_dirty)
    entries, key = stored(), f"{name}, {modality}, {args.split}"
    if key in entries:
        return
    model, processor = load_model(name, device="cpu")
    chosen = list(items(args.split, args.per_family, QUESTIONS[name][modality]))
    source = shapesqa(chosen, ACCURACY / "results" / "media" / args.split)
    how = {"batch_size": args.batch, "progress": key, "name": name}
    runs = sweep(model, processor, source, SETTINGS[modality], None, **how)
    entries[key] = {
        "model": name, "weights": weights_hash(model), "provenance": {**environment(), **facts},
        "answers": PackedAnswers.of({s.key: run for s, run in runs.items()}, None),
    }  # fmt: skip
    publishing.write(ANSWERS, stored_sets(entries))


def clock(args: argparse.Namespace) -> None:
    """Times of one prefill, tower included, on one thread (processor time)."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    torch.set_num_threads(1)
    shape = argparse.Namespace(part=PART, dtype="float32", device="cpu", attention="sdpa")
    model, timer = build("qwen2-vl-2b", shape), clock_of("cpu")
    times = json.loads(CLOCK.read_text())["rows"] if CLOCK.exists() else []
    for case, (frames, units) in CASES.items():
        if case in [row["case"] for row in times]:
            continue
        how = argparse.Namespace(threads=1, dtype="float32", device="cpu")
        inputs = qwen_inputs(model, frames, units * UNIT, how)["inputs"]
        prefill = partial(model, **inputs, use_cache=True, logits_to_keep=1)
        with torch.inference_mode():
            if frames or units < 64:
                prefill()  # warm
            full = timing.seconds(prefill, timer)
            for speedup in SPEEDUPS:
                with tokencomp.patch(model, speedup=speedup) as handle:
                    seconds, stats = timing.seconds(prefill, timer), handle.stats
                times.append({
                    "case": case, "speedup": speedup, "measured": full / seconds,
                    "planned": stats.speedup, "tower_ratio": stats.tower_ratio,
                    "ratio": stats.ratio, "full_s": full,
                })  # fmt: skip
                print(times[-1], flush=True)
        publishing.write(CLOCK, {"provenance": {**environment(), **facts}, "rows": times})


def stored() -> dict[str, Any]:
    return read_sets(publishing.read(ANSWERS)) if ANSWERS.exists() else {}


def page() -> str:
    """The whole page."""
    timed, entries = json.loads(CLOCK.read_text()), stored()
    rows = [
        [r["case"], f"{r['speedup']:g}", f"{r['planned']:.2f}", f"{r['measured']:.2f}",
         f"{r['tower_ratio']:.2f}", f"{r['ratio']:.2f}"]
        for r in timed["rows"]
    ]  # fmt: skip
    head = ["prompt", "asked", "planned (FLOPs)", "measured", "tower ratio", "ratio"]
    parts = ["# `speedup=`: asked, planned, measured, and what is kept", INTRO, "## Time"]
    parts += [publishing.table(head, rows), "## Right answers kept"]
    names = ["speedup 1.5", "2", "3", "ratio 0.75", "smaller, about 2×", "smaller, about 3×"]
    table = []
    for key, entry in entries.items():
        correct = entry["answers"].correct
        full, *others = [setting.key for setting in SETTINGS[key.split(", ")[1]]]
        accuracy = f"{sum(correct[full]) / len(correct[full]):.1%} of {len(correct[full])}"
        kept = [str(retention(correct[one], correct[full])) for one in others]
        table.append([key, accuracy, *kept])
    for split in ("validation", "test"):
        for modality in SETTINGS:
            full, *others = together(entries, modality, split)
            accuracy = f"{sum(full) / len(full):.1%} of {len(full)}"
            kept = [str(retention(other, full)) for other in others]
            table.append([f"**all, {modality}, {split}**", accuracy, *kept])
    parts.append(publishing.table(["model, questions", "right without", *names], table))
    parts += ["## By kind of question", KINDS, by_kind(entries)]
    runs = [f"- clock: {publishing.provenance(timed['provenance'])}"]
    runs += [f"- {key}: {publishing.provenance(e['provenance'])}" for key, e in entries.items()]
    return "\n\n".join([*parts, "## Runs", "\n".join(runs)]) + "\n"


def together(entries: dict[str, Any], modality: str, split: str) -> list[list[int]]:
    """Right answers of all models, 0 or 1 per question, by setting of `SETTINGS`."""
    found: list[list[int]] = [[] for _ in SETTINGS[modality]]
    for name in QUESTIONS:
        correct = entries[f"{name}, {modality}, {split}"]["answers"].correct
        for row, setting in zip(found, SETTINGS[modality], strict=True):
            row += correct[setting.key]
    return found


def files(folder: Path = HERE) -> Files:
    """The page."""
    return {folder / "speedup.md": page()}


PACKED = ("tiny-qwen3-vl", "tiny-qwen2-vl", "tiny-qwen3-5")
KINDS = (
    "Test questions of the three models whose towers take pictures of any size, together. Towers "
    "of pictures of one size make a smaller picture large again, so it saves no time there."
)


def by_kind(entries: dict[str, Any]) -> str:
    """Right answers kept by kind of question, over the models of `PACKED`, on test questions."""
    kinds: dict[tuple[str, str], list[list[int]]] = {}
    for key, entry in entries.items():
        model, modality, split = key.split(", ")
        if model not in PACKED or split != "test":
            continue
        full, _, twice, _, alone, smaller, _ = (s.key for s in SETTINGS[modality])
        answers = entry["answers"]
        rows = zip(*(answers.correct[k] for k in (full, twice, alone, smaller)), strict=True)
        for kind, row in zip(answers.questions.families, rows, strict=True):
            kinds.setdefault((modality, kind), []).append(list(row))
    table = []
    for (modality, kind), rows in kinds.items():
        full, *others = zip(*rows, strict=True)
        shares = [str(retention(other, full)) for other in others]
        table.append(
            [f"{kind} ({modality})", f"{sum(full) / len(full):.1%} of {len(full)}", *shares]
        )
    head = ["kind", "right without", "speedup 2", "ratio 0.75 (1.2 to 1.3×)", "smaller, about 2×"]
    return publishing.table(head, table)


INTRO = """Time: Qwen2-VL-2B's shapes with random weights, a quarter of the blocks of tower and
decoder, one thread (processor time), one round; planned by the FLOPs of the whole prompt. Answers:
embedded tiny models on ShapesQA, greedy; in brackets, paired 95 % intervals. "smaller": pictures or
frames with 45 and 60 % (clips 54 and 66 %) of their pixels gone, without a patch, which takes about
as much time as speedup 2 and 3 of the same shapes ([clock](README.md)). The paths were fixed by
validation questions of the tiny Qwen3-VL ([all settings](README.md)) before this page existed; no
test question was asked for the choice. No percentage here carries over to a 7B
model.""".replace("\n", " ")


def main() -> None:
    parser = publishing.parser(__doc__, HERE, "--output", report=False)
    parser.add_argument("part", choices=("answers", "clock", "page"))
    parser.add_argument("--models", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--per-family", type=int, default=30)
    parser.add_argument("--batch", type=int, default=20)
    args = parser.parse_args()
    if args.part == "answers":
        for name in args.models:
            for modality in QUESTIONS[name]:
                answer(name, modality, args)
    elif args.part == "clock":
        clock(args)
    else:
        write(files())


if __name__ == "__main__":
    with one_message():
        main()
