"""Two reducers in one plan: one at decoder entry, one between layers (ours)."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from tokencomp.errors import OptionError, UnknownOptionError, hint
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.options import Traits
from tokencomp.plan.plan import Plan, Stage
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.published import Published, deviation, revision
from tokencomp.tokens.tokens import ModelFacts
from tokencomp.validation import between

PROBE = (0.5, 32)  # ratio and number of layers at which the parts are planned as a check


@dataclass(frozen=True)
class Compose(Published):
    """An entry reducer, then a layer reducer on what it keeps; together they meet the ratio.

    `make_reducer("bipartite+prune", share=0.7, **{"prune.score": "last_query"})`

    Attributes
    ----------
    entry, layer
        The two reducers.
    share
        Share of the reduction at entry, in [0, 1]: the entry stage keeps (1 - ratio)^share of the
        tokens, and the schedule of the layer reducer is solved for the rest.
    """

    entry: Reducer
    layer: Reducer
    share: float = dataclasses.field(default=0.5, metadata=between(0, 1))

    summary = "an entry reducer and a layer reducer, budget-matched together (ours)"

    def __post_init__(self) -> None:
        super().__post_init__()
        entry, layer = (
            [s.layer for s in part.plan(*PROBE).stages] for part in (self.entry, self.layer)
        )
        if entry != [0] or 0 in layer:
            raise OptionError(
                f"{self.name}: the first reducer must act at decoder entry, such as bipartite, "
                "condiv or pool, and the second one between layers, such as prune, fastv or adsc; "
                "give random and uniform a depth for that (at=0.7)."
            )

    @property
    def name(self) -> str:  # type: ignore[override]  # a class variable elsewhere
        return f"{self.entry.name}+{self.layer.name}"

    @property
    def traits(self) -> Traits:  # type: ignore[override]  # a class variable elsewhere
        return Traits(merges=self.entry.traits.merges or self.layer.traits.merges)

    @property
    def revision(self) -> int:
        return max(revision(self.entry), revision(self.layer))

    def plan(self, ratio: float, num_layers: int) -> Plan:
        if not check_ratio(ratio):
            return Plan()
        first, rest = self._parts(ratio)
        later = self.layer.plan(rest, num_layers).stages
        # A layer schedule that cannot meet its ratio between layers begins with a stage at entry,
        # which is joined with the stage of the entry reducer.
        start = later[0].fraction if later and later[0].layer == 0 else 1.0
        entry = (Stage(0, first * start, self.entry),) if first * start < 1 else ()
        scaled = [Stage(s.layer, first * s.fraction, s.reducer) for s in later if s.layer > 0]
        return Plan((*entry, *scaled))

    def deviation(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        first, rest = self._parts(ratio)
        parts = (
            deviation(self.entry, 1.0 - first, num_layers, frames),
            deviation(self.layer, rest, num_layers, frames),
        )
        return "; ".join(part for part in parts if part)

    def _parts(self, ratio: float) -> tuple[float, float]:
        """The fraction that the entry stage keeps, and the ratio of the layer reducer."""
        target = 1.0 - check_ratio(ratio)
        first = target**self.share
        return first, max(1.0 - target / first, 0.0)

    def bind(self, facts: ModelFacts) -> Reducer:
        return dataclasses.replace(self, entry=self.entry.bind(facts), layer=self.layer.bind(facts))


def composed_options(
    name: str, options: dict[str, Any], fields: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Options of a composition by part.

    They are named "part.option", or "option" if only one part has it; `fields` are the option names
    of each part.
    """
    by_part: dict[str, dict[str, Any]] = {part: {} for part in fields}
    for key, value in options.items():
        prefix, _, option = key.rpartition(".")
        parts = [p for p in fields if option in fields[p] and prefix in ("", p)]
        if len(parts) != 1:
            known = sorted(f"{p}.{o}" for p in fields for o in fields[p])
            raise UnknownOptionError(
                f"reducer {name!r}: {key!r} names {'two options' if parts else 'no option'}."
                f"{'' if parts else hint(key, ['share', *itertools.chain(*fields.values())])} "
                f"It has: share, {', '.join(known)}."
            )
        by_part[parts[0]][option] = value
    return by_part
