"""The same questions to the model about other pictures, and to a model of another family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from benchmarks.long.answers import ask
from benchmarks.long.redrawn import redrawn
from benchmarks.long.settings import DEFAULT, RATIOS
from benchmarks.long.stored import Answers
from benchmarks.publishing import environment
from tokencomp.evaluation.settings import DOWNSCALE, MERGE, RANDOM, UNIFORM, Setting
from tokencomp.zoo.shapesqa.long_scenes import SIDE, LongItem, item

KIND = "images"
Asked = tuple[tuple[str, dict[str, Any]], ...]
_MERGED: dict[str, Any] = {MERGE: True}


@dataclass(frozen=True)
class Confirmation:
    """What is asked again, and where the answers are stored.

    Attributes
    ----------
    file
        Name of the file of answers.
    each
        Questions of a family.
    families
        Families of questions about pictures.
    methods
        Reducers with their options, at all of `RATIOS`.
    other : bool
        Whether pictures are drawn by `redrawn`.
    sides, most
        Sides of the pictures that are asked about, and their largest number of objects.
    """

    file: str
    each: int
    families: tuple[str, ...]
    methods: Asked
    other: bool
    sides: tuple[int, ...] = SIDE
    most: int = 12

    def settings(self) -> list[Setting]:
        """The full model first; smaller pictures replace what the tower gave: they come last."""
        return [Setting(), *(Setting(n, r, dict(o)) for n, o in self.methods for r in RATIOS)]

    def items(self, split: str, families: Sequence[str] = (), each: int = 0) -> list[LongItem]:
        """The first items of every family whose pictures fit."""
        out = []
        for family in families or self.families:
            every = (item(split, family, k) for k in count())
            out += islice(filter(self._fits, every), each or self.each)
        return [redrawn(one) for one in out] if self.other else out

    def _fits(self, one: LongItem) -> bool:
        scene = one.scenes[0]
        return scene.width in self.sides and len(scene.things) <= self.most


CONFIRMATIONS = {
    "renderer": Confirmation(
        "other-renderer.json",
        24,
        ("describe", "count", "read", "compare"),
        (
            (DEFAULT, {}), ("condiv", {}), ("condiv", _MERGED), ("kcenter", {}),
            (RANDOM, {}), (UNIFORM, {}), (DOWNSCALE, {}),
        ),
        other=True,
    ),
    "family": Confirmation(
        "second-family.json",
        100,
        ("describe", "count"),
        (
            (DEFAULT, {}), ("condiv", {}), ("condiv", _MERGED), ("kcenter", _MERGED),
            ("fastv", {}), (RANDOM, {}), (UNIFORM, {}),
        ),
        other=False,
        sides=SIDE[:1],
        most=6,
    ),
}  # fmt: skip


def confirm(
    name: str, loaded: tuple[Any, Any], folder: Path, build: Path, batch: int, facts: dict[str, Any]
) -> None:
    """Ask, and store the answers."""
    how = CONFIRMATIONS[name]
    items = how.items("test")
    runs = ask(*loaded, items, how.settings(), build / name, batch)
    texts, reached = {}, {}
    for setting, run in runs.items():
        said = {record["id"]: record["prediction"] for record in run.answered}
        texts[setting.label] = [said[one.id] for one in items]
        reached[setting.label] = round(float(run.summary().get("achieved_ratio", 0.0)), 4)
    stored = Answers()
    stored.add(KIND, [one.id for one in items], texts, reached, {**environment(), **facts})
    stored.write(folder / how.file)
