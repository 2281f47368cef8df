"""Baselines that look at places only, at decoder entry or at a depth of choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import once
from tokencomp.reducers.published import Published

LEAST = 0.05  # the smallest fraction that a late cut leaves; below it the cut comes earlier


@dataclass(frozen=True)
class Baseline(Published):
    """A reducer that needs no signal and may cut once between layers.

    Attributes
    ----------
    at
        Where it acts, as a fraction of the depth; 0: at decoder entry. `condiv+random` with
        `at=20/28` tests the claim of arXiv 2512.07580 that beyond such a depth no criterion beats
        a random choice. Where a ratio would leave less than 0.05 of the tokens, the cut comes
        earlier, which tables mark (†).
    """

    # Not in the repr, by which stored answers know a method; theirs stands among their options.
    at: float = field(default=0.0, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.at < 1:
            raise OptionError(
                f"{self.name}: at={self.at!r}; allowed: a number from 0 (decoder entry) to below "
                "1, the fraction of the decoder's depth at which tokens leave."
            )

    def plan(self, ratio: float, num_layers: int) -> Plan:
        if not self.at:
            return super().plan(ratio, num_layers)
        (first,) = self.published_layers(num_layers)
        left = 1.0 - check_ratio(ratio)
        return from_profile(once(num_layers, left, first, min(LEAST, left)), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        return (min(round(self.at * num_layers), num_layers - 1),) if self.at else ()
