"""Settings of the frontier, in the form that both the answers and the clock understand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
