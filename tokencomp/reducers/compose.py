"""Two reducers in one plan: one at decoder entry, one between layers (ours)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan
from tokencomp.plan.reducer import Traits
from tokencomp.plan.stages import Stage
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.published import Published, deviation, revision
from tokencomp.tokens.spans import ModelFacts
from tokencomp.validation import between

PROBE = (0.5, 32)  # ratio and number of layers at which `_acts` plans a part


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
        for part in (self.entry, self.layer):
            if not isinstance(part, Reducer):
                raise OptionError(f"compose: {part!r} is not a reducer. Use make_reducer.")
        super().__post_init__()
        if not _acts(self.entry, at_entry=True):
            raise OptionError(
                f"{self.name}: {self.entry.name!r} does not act at decoder entry, so it cannot "
                "come first. Name an entry reducer first, such as bipartite, condiv or pool."
            )
        if not _acts(self.layer, at_entry=False):
            raise OptionError(
                f"{self.name}: {self.layer.name!r} does not act between layers only, so it cannot "
                "come second. Name a layer reducer second, such as prune, fastv or adsc, or give "
                "random and uniform a depth (at=0.7)."
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


def _acts(reducer: Reducer, at_entry: bool) -> bool:
    layers = [s.layer for s in reducer.plan(*PROBE).stages]
    return layers == [0] if at_entry else 0 not in layers


def part_names(name: str) -> list[str]:
    """The two names in "first+second"; raise `OptionError` unless there are two, and different."""
    names = [part.strip() for part in name.split("+")]
    if len(names) != 2 or names[0] == names[1] or not all(names):
        raise OptionError(
            f"reducer {name!r}: a composition has two different parts, an entry reducer and a "
            'layer reducer, e.g. "bipartite+prune".'
        )
    return names


def assign_options(
    name: str, options: dict[str, Any], fields: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Options of a composition by part, without `share`.

    They are named "part.option", or "option" if only one part has it; `fields` are the option names
    of each part.
    """
    by_part: dict[str, dict[str, Any]] = {part: {} for part in fields}
    for key, value in options.items():
        prefix, _, option = key.rpartition(".")
        if key == "share":
            continue
        if prefix and prefix not in fields:
            raise OptionError(f"reducer {name!r} has no part {prefix!r} (option {key!r}).")
        parts = [prefix] if prefix else [p for p in fields if option in fields[p]]
        if len(parts) != 1:
            known = sorted(f"{p}.{o}" for p in fields for o in fields[p])
            why = "is an option of both parts" if parts else "is an option of neither part"
            raise OptionError(
                f"reducer {name!r}: {key!r} {why}. It has: share, {', '.join(known)}."
            )
        by_part[parts[0]][option] = value
    return by_part
