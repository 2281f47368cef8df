"""The page of the frontier: what is on it by validation questions, and what test questions say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Files
from benchmarks.frontier.answers import read
from benchmarks.frontier.grid import FULL, Point, points
from tokencomp.evaluation.metrics import retention

HERE = publishing.FOLDER / "frontier"
BAR = 0.97
INTRO = f"""Speed: time to the first token (pixels to logits) of Qwen2-VL-2B's shapes with random
weights, a quarter of the blocks of tower and decoder, one CPU thread (processor time), an image of
1,024 tokens and a video of 32 frames; times as fast as without compression, median of the rounds.
Accuracy: right answers of the embedded tiny Qwen3-VL, as a share of the right answers without
compression, on ShapesQA questions (six families about images, five about videos). "tower 0.4 at
1/4": tower ratio 0.4, by a stage before block 1/4 of the depth, which keeps the fraction in the
next column; "smaller": pictures or frames with fewer pixels, without a patch.

**Rule**, written before any test question was asked: of all settings, the fastest that keeps at
least {BAR:.0%} on validation questions. Bold: the frontier, settings for which no other setting is
both faster and more accurate on validation questions. Test questions were then asked for the
frontier, for the settings with a whole tower, and for smaller pictures; in brackets, paired 95 %
intervals. The tower that was timed has 32 blocks at full depth, the one that answers has 8: the
place of a stage is a fraction of the depth. No percentage here carries over to a 7B model."""


class Measured:
    """Speed and accuracy of every setting of one modality."""

    def __init__(self, modality: str, clock: dict[str, Any], answers: dict[str, Any]) -> None:
        self.modality = modality
        self.speedups = clock[modality]["speedups"]
        self.answers = {
            split: answers[f"{modality}, {split}"]["answers"].correct
            for split in ("validation", "test")
            if f"{modality}, {split}" in answers
        }

    def speed(self, point: Point) -> float:
        return 1.0 if point == FULL else statistics.median(self.speedups[point.key])

    def kept(self, point: Point, split: str = "validation") -> Any:
        """Retention of right answers, with its interval."""
        correct = self.answers[split]
        return retention(correct[point.key], correct[FULL.key])

    def frontier(self) -> list[Point]:
        """Settings that no other setting beats in both respects, slowest first."""
        known = [p for p in points() if p.key in self.answers["validation"]]
        pairs = {p: (self.speed(p), self.kept(p).value) for p in known}
        best = [
            p
            for p, (speed, kept) in pairs.items()
            if not any(
                s >= speed and k >= kept and (s, k) != (speed, kept) for s, k in pairs.values()
            )
        ]
        return sorted(best, key=self.speed)

    def chosen(self) -> Point:
        """The fastest setting above the bar."""
        return max((p for p in self.frontier() if self.kept(p).value >= BAR), key=self.speed)

    def tested(self) -> list[Point]:
        """Settings whose test answers are asked: the frontier, whole towers, smaller pictures."""
        front = self.frontier()
        extra = [p for p in points() if p.smaller or not p.tower_ratio]
        return [p for p in points() if p in front or p in extra]


def label(point: Point) -> tuple[str, str]:
    """The setting, and the fraction that its tower stage keeps."""
    if point == FULL:
        return "no compression", "–"
    if point.smaller:
        return f"smaller, {point.ratio:g} of the pixels gone", "–"
    if not point.tower_ratio:
        return f"ratio {point.ratio:g}", "1"
    at = {0.0: "block 0", 0.25: "1/4", 0.5: "1/2"}[point.depth]
    return f"ratio {point.ratio:g}, tower {point.tower_ratio:g} at {at}", f"{point.kept:.2f}"


def section(measured: Measured) -> str:
    """Table of one modality, and the setting that the rule chooses."""
    front, chosen, rows = measured.frontier(), measured.chosen(), []
    for point in sorted(points(), key=measured.speed):
        name, kept = label(point)
        mark = "**" if point in front else ""
        test = measured.answers.get("test", {})
        cell = str(measured.kept(point, "test")) if point.key in test else "–"
        speed = measured.speed(point)
        validation = f"{measured.kept(point).value:.1%}"
        rows.append([f"{mark}{name}{mark}", kept, f"{speed:.2f}×", validation, cell])
    head = ["setting", "tower keeps", "first token", "kept, validation", "kept, test"]
    found = f"The rule chooses **{label(chosen)[0]}**."
    counts = ", ".join(f"{len(a[FULL.key])} {split}" for split, a in measured.answers.items())
    title = f"## {measured.modality.capitalize()}s ({counts} questions)"
    return "\n\n".join([title, publishing.table(head, rows), found])


def stored(folder: Path = HERE) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times and answers in a folder."""
    return json.loads((folder / "clock.json").read_text()), read(folder / "answers.json")


def files(folder: Path = HERE) -> Files:
    """The page of the results in a folder."""
    return {folder / "README.md": page(*stored(folder))}


def page(clock: dict[str, Any], answers: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        "# Which setting: speed of the first token against accuracy",
        INTRO.replace("\n\n", "\0"),
    ]
    parts[1] = parts[1].replace("\n", " ").replace("\0", "\n\n")
    parts += [section(Measured(modality, clock, answers)) for modality in clock]
    made = [
        f"- clock, {name}: {publishing.provenance(e['provenance'])}" for name, e in clock.items()
    ]
    made += [
        f"- answers, {name}: {publishing.provenance(e['provenance'])}"
        for name, e in answers.items()
    ]
    return "\n\n".join([*parts, "## Runs", "\n".join(made)]) + "\n"
