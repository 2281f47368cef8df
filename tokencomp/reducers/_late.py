"""Baselines that need only token indices, at decoder entry or between layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import once
from tokencomp.reducers.published import Published
from tokencomp.validation import between

LEAST = 0.05  # smallest fraction that a late cut keeps; below it the cut comes earlier


@dataclass(frozen=True)
class Baseline(Published):
    """A reducer that needs no signal and can act once between layers.

    Attributes
    ----------
    at
        Where it acts, as a fraction of the depth; 0: at decoder entry. `condiv+random` with
        `at=20/28` tests the claim of arXiv 2512.07580 that from such a depth on no criterion beats
        a random choice. If less than 0.05 of the tokens would be kept, the cut comes earlier, which
        tables mark (†).
    """

    # Not in the repr, which names the method in stored answers: they record options separately.
    at: float = field(default=0.0, metadata=between(0, 1), repr=False, kw_only=True)

    def plan(self, ratio: float, num_layers: int) -> Plan:
        if not self.at:
            return super().plan(ratio, num_layers)
        (first,) = self.published_layers(num_layers)
        target = 1.0 - check_ratio(ratio)
        return from_profile(once(num_layers, target, first, min(LEAST, target)), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        return (min(round(self.at * num_layers), num_layers - 1),) if self.at else ()
