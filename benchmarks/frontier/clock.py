"""Speed of the settings: first token of Qwen2-VL-2B's shapes with random weights."""

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
from benchmarks.frontier.grid import FULL, Point
from benchmarks.models.tower_parts import UNIT, build, clock_of, qwen_inputs
from benchmarks.publishing import environment
from tokencomp.evaluation import timing

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


def measure(modality: str, points: Sequence[Point], args: argparse.Namespace, path: Path) -> None:
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
    stored[modality] = {"provenance": {**facts, **environment()}, "speedups": times}
    publishing.write(path, stored)
