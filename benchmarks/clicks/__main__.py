"""Right clicks of a tiny model on pages of MiniWoB++, by visual tokens, with and without a zoom.

    python -m recipes.clicks.pages     # needs Chromium; → build/clicks/*.npz
    python -m recipes.clicks.build     # trains the model
    python -m benchmarks.clicks        # → results.json, README.md

Every screen shows four pages and every page is asked about once, greedily. A zoom looks twice: at
the screen with few tokens, then at the quarter of the screen around that click, at full resolution.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokencomp
from benchmarks.accuracy.packed import pack
from benchmarks.clicks.page import page
from benchmarks.experiment import Experiment
from tokencomp.inputs.loading import load_folder
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.zoom import Region

SPLIT = "test"
TRAINING = ("seed", "start", "finished", "steps", "seconds", "training_scores", "date", "commit")
ANSWER = re.compile(r"<x(\d+)>\s*<y(\d+)>")
ZOOM = 10
"""Visual tokens on a side of the closer look."""


@dataclass(frozen=True)
class Look:
    """What the model gets of a screen.

    Attributes
    ----------
    cells
        Visual tokens on a side, before compression.
    budget
        Of the default reducer; None: no compression.
    zoom
        Whether a closer look at the quarter around the click follows.
    """

    cells: int
    budget: int | None = None
    zoom: bool = False

    @property
    def first(self) -> Look:
        return Look(self.cells, self.budget)

    @property
    def tokens(self) -> int:
        """Visual tokens in the decoder, of both looks."""
        return (self.budget or self.cells**2) + self.zoom * ZOOM**2

    @property
    def name(self) -> str:
        what = "whole" if self.cells == 20 else "smaller picture"
        what = f"budget={self.budget}" if self.budget else f"{what}, {self.cells**2}"
        return f"{what} + zoom" if self.zoom else what


LOOKS = (
    Look(20),
    *(Look(20, budget) for budget in (200, 100, 50)),
    *(Look(cells) for cells in (14, 10, 7)),
    Look(20, 100, zoom=True),
    Look(20, 50, zoom=True),
    Look(10, zoom=True),
    Look(7, zoom=True),
)


class Clicker:
    """A trained model as its users run it: the processor's chat, `patch`, `generate`."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.model, self.processor = load_folder(str(folder))
        self.batch = batch

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Any], texts: Sequence[str], budget: int | None) -> list:
        """The coordinates that the model answers, None where it answers something else."""
        out: list[tuple[int, int] | None] = []
        with tokencomp.patch(self.model, budget=budget) if budget else nullcontext():
            for first in range(0, len(texts), self.batch):
                some = slice(first, first + self.batch)
                inputs = build_inputs(self.processor, [[p] for p in pictures[some]], texts[some])
                made = self.model.generate(**inputs, max_new_tokens=2, do_sample=False)
                said = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :])
                found = [ANSWER.search(text) for text in said]
                out += [(int(m[1]), int(m[2])) if m else None for m in found]
        return out


def ask(clicker: Clicker, screens: Sequence[Any], looks: Sequence[Look]) -> dict[Look, list[Any]]:
    """The pixel of every click, by look; None where the answer has no coordinates."""
    from recipes.clicks.screens import SCREEN, pixel, view

    images = [screen.image for screen in screens for _ in screen.questions]
    texts = [question.text for screen in screens for question in screen.questions]
    whole = [Region(0, 0, SCREEN, SCREEN)] * len(images)
    clicks: dict[Look, list[Any]] = {}
    for look in looks:
        regions = _around(clicks[look.first]) if look.zoom else whole
        cells = ZOOM if look.zoom else look.cells
        shown = [view(r.cut(one), cells) for r, one in zip(regions, images, strict=True)]
        found = clicker(shown, texts, None if look.zoom else look.budget)
        clicks[look] = [a and pixel(a, r) for a, r in zip(found, regions, strict=True)]
        print(look.name, flush=True)
    return clicks


def _around(clicks: Sequence[Any]) -> list[Region]:
    """The quarter of the screen around every first click; its middle where there is none."""
    from recipes.clicks.screens import SCREEN

    half = SCREEN // 2
    size = (half, half)
    return [Region.around(*(at or size), size, (SCREEN, SCREEN)) for at in clicks]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Right clicks of every look, as packed bits in the order of `tasks`."""
    from recipes.clicks.screens import SCREEN, Pages

    torch.set_num_threads(args.threads)
    training = json.loads((args.folder / "run" / "training.json").read_text())
    training = {name: training[name] for name in TRAINING}
    screens = [*Pages(args.folder / f"{SPLIT}.npz").fixed()]
    asked = [question for screen in screens for question in screen.questions]
    areas = [max((b[2] - b[0]) * (b[3] - b[1]) for b in q.boxes) for q in asked]
    clicks = ask(Clicker(args.folder / "run" / "model", args.batch), screens, LOOKS)
    rows = []
    for look, found in clicks.items():
        right = [at is not None and q.hit(*at) for at, q in zip(found, asked, strict=True)]
        rows.append({
            "look": look.name, "tokens": look.tokens, "zoom": look.zoom, "right": pack(right),
            "unread": sum(at is None for at in found),
        })  # fmt: skip
    yield {
        "training": training, "screens": len(screens), "tasks": [q.task for q in asked],
        "area": float(np.mean(areas)) / SCREEN**2, "rows": rows,
    }  # fmt: skip


OPTIONS = {
    "folder": (Path("build/clicks"), "with test.npz and run/model"),
    "batch": 16,
    "threads": 1,
}
EXPERIMENT = Experiment("clicks/results", measure, page, options=OPTIONS, readme=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
