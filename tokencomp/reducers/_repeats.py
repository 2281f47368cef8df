"""Reducers whose counts the pixels decide: cells that repeat what was kept are dropped."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.options import Traits
from tokencomp.plan.plan import Plan, TowerStage
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import make_reducer
from tokencomp.tokens.tokens import Kept, Tokens
from tokencomp.validation import between


@dataclass(frozen=True)
class DropsRepeats(Reducer):
    """Base class of reducers that drop repeated cells before the vision tower.

    The count follows from the pixels. With a ratio or budget, `then` keeps at most that share or
    number of the tokens of every uncompressed item, chosen among the tokens that are left.

    Attributes
    ----------
    threshold : int
        Largest difference between two pixels, of 0 … 255 in a channel, that counts as equal. The
        default 0 drops exact copies alone, which loses nothing; 8 survives the noise of JPEG.
    then : str
        The reducer for a ratio or budget: "auto", or a name.
    """

    threshold: int = field(default=0, metadata=between(0, 255))
    then: str = "auto"

    traits = Traits(grid="whole", batched=True, decides=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.later.traits.decides:
            raise OptionError(
                f"{self.name}: then={self.then!r} takes no ratio either. Name a reducer that does, "
                "such as 'kcenter'."
            )

    @property
    def later(self) -> Reducer:
        """The reducer that a ratio or budget is for."""
        return make_reducer(self.then)

    @abstractmethod
    def repeats(self, tokens: Tokens, limit: float | Tensor) -> Tensor:
        """Which patches repeat what was kept, bool, shape (n,).

        `limit` is the threshold in the unit of the pixels, one number or one for each of d values.
        """

    def reduce(self, tokens: Tokens) -> Kept:
        repeated = self.repeats(tokens, self._limit(tokens))
        for part in repeated.split(tokens.lengths):
            part[0] &= ~part.all()  # every image or video keeps a cell
        return Kept((~repeated).nonzero()[:, 0])

    def _limit(self, tokens: Tokens) -> float | Tensor:
        if not self.threshold:
            return 0.0
        assert tokens.levels is not None and tokens.pixels is not None
        # Pixels are whole numbers, so that half a level absorbs what their scaling has rounded.
        limits = (self.threshold + 0.5) * tokens.levels
        t, h, w = tokens.pixels
        patches = tokens.features.shape[1] // (len(limits) * t * h * w)
        return limits.repeat_interleave(t * h * w).repeat(patches).to(tokens.device)

    def plan(self, ratio: float, num_layers: int) -> Plan:
        stages = self.later.plan(ratio, num_layers).stages if check_ratio(ratio) else ()
        return Plan(stages, TowerStage(0, 1.0, self))
