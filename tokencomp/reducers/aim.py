"""AIM: merging at entry, then pruning between layers (arXiv 2412.03248)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, Stage, from_profile
from tokencomp.plan.schedules import aim, check_ramp, natural_aim
from tokencomp.reducers import Published, Traits, register_reducer
from tokencomp.reducers.bipartite import Bipartite
from tokencomp.reducers.prune import Prune


@register_reducer("aim")
@dataclass(frozen=True)
class Aim(Published):
    """Preset of AIM (arXiv 2412.03248): `bipartite` merging at entry, `prune` by PageRank on a
    ramp.

    The ramp, from layer l1 = start · L to l2 = stop · L, lets layer l + 1 see the fraction

        clamp(1 - (l - l1 + 1) / (l2 - l1), 0, 1)

    of what reaches the decoder. It keeps its published place, and merging removes the rest of the
    ratio. Where the ramp alone would remove more than the ratio, nothing is merged and the ramp
    starts later (ours). One merging step and the first pruning stage choose the same tokens as the
    release; for later stages see `prune`.

    Attributes
    ----------
    weighted
        As in `bipartite`.
    start, stop
        The ramp as fractions of the depth L; published: 14/28 … 22/28 for video, 13/32 … 21/32 for
        images.
    """

    weighted: bool = True
    start: float = 0.5
    stop: float = 22 / 28

    revision = 2
    summary = "merge at entry + PageRank pruning between layers (AIM 2412.03248)"
    traits = Traits(merges=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ramp("aim", self.start, self.stop)

    def plan(self, ratio: float, num_layers: int) -> Plan:
        target = 1.0 - check_ratio(ratio)
        natural = natural_aim(num_layers, self.start, self.stop)
        mean = sum(natural) / num_layers
        if target >= mean:
            return from_profile(aim(num_layers, target, self.start, self.stop), Prune())
        entry = target / mean
        prune = from_profile([entry * f for f in natural], Prune()).stages
        merge = Stage(0, entry, Bipartite(self.weighted))
        return Plan((merge, *(s for s in prune if s.layer > 0)))

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        prune = Prune(start=self.start, stop=self.stop)
        return (0, *prune.published_layers(num_layers))
