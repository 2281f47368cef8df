"""The settings of the frontier, and its page: what is on it, and what test questions say."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import read_sets
from benchmarks.experiment import Files
from tokencomp.evaluation.metrics import retention
from tokencomp.evaluation.settings import DOWNSCALE, PLAN, Setting

RATIOS = (0.5, 0.75, 0.9)
TOWER_RATIOS = (0.25, 0.4, 0.5, 0.6)
DEPTHS = (0.0, 0.25, 0.5)
SMALLER = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True)
class Point:
    """One setting: the work that the tower and the decoder leave out.

    Attributes
    ----------
    ratio
        Of the decoder. For smaller pictures: of tower and decoder.
    tower_ratio
        Of the tower; 0: the tower sees all patches.
    depth
        The stage in the tower comes before this fraction of the blocks.
    smaller
        Whether pictures have fewer pixels, and the model is not patched.
    """

    ratio: float = 0.0
    tower_ratio: float = 0.0
    depth: float = 0.0
    smaller: bool = False

    @property
    def kept(self) -> float:
        """Fraction of the patches that stay in the tower.

        Blocks before the stage see all patches, so at depth d a stage that keeps f leaves
        d + (1 - d) · f of the work: tower ratio 0.4 at d = 1/4 is f = 0.47.
        """
        return (1 - self.tower_ratio - self.depth) / (1 - self.depth)

    @property
    def possible(self) -> bool:
        """Whether the tower keeps at least as many tokens as the decoder is given."""
        return self.kept > 0 and self.kept >= 1 - self.ratio - 1e-9

    @property
    def key(self) -> str:
        """Name in the stored results."""
        if self.smaller:
            return f"smaller {self.ratio:g}"
        return f"ratio {self.ratio:g}, tower {self.tower_ratio:g} at {self.depth:g}"

    def plan(self, blocks: int) -> list[dict[str, Any]]:
        """Stages in JSON form, for a tower of `blocks` blocks."""
        decoder = {"layer": 0, "fraction": 1 - self.ratio, "reducer": "auto", "merge": "auto"}
        if not self.tower_ratio:
            return [decoder]
        block = round(self.depth * blocks)
        return [{"tower": block, "fraction": self.kept, "reducer": "kcenter"}, decoder]

    def setting(self, blocks: int) -> Setting:
        """The row of an evaluation."""
        if self.smaller:
            return Setting(DOWNSCALE, self.ratio, name=self.key)
        if not self.ratio:
            return Setting()
        options = {"plan": self.plan(blocks)}
        return Setting(PLAN, self.ratio, options, name=self.key)


FULL = Point()


def points() -> list[Point]:
    """All settings: the full model, the tower stage, smaller pictures."""
    stages = [
        Point(ratio, tower, depth) for ratio in RATIOS for depth in DEPTHS for tower in TOWER_RATIOS
    ]
    whole_towers = [Point(ratio) for ratio in RATIOS]
    smaller = [Point(ratio, smaller=True) for ratio in SMALLER]
    return [FULL, *whole_towers, *(p for p in stages if p.possible), *smaller]


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
    return json.loads((folder / "clock.json").read_text()), answers_of(folder / "answers.json")


def answers_of(path: Path) -> dict[str, Any]:
    """Stored answers by "MODALITY, SPLIT"."""
    return read_sets(publishing.read(path)) if path.exists() else {}


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
