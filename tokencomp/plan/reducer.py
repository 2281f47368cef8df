"""What a plan knows of a reducer. Reducers make plans, so that plans do not import them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

AnyReducer = Any
"""A `tokencomp.Reducer`."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """What is always true of a method, for plans, the engine and servers.

    Attributes
    ----------
    merges
        Kept tokens take in dropped ones; `Kept.weights` then says how many.
    grid
        Which grid a span must have. "known": it reads places in the grid, so that spans of unknown
        grid are refused. "whole": it compares places of the whole grid, so that no earlier stage
        may have dropped tokens either.
    batched
        It sees all spans of a call at once, to treat them with one launch per step. What it keeps
        of a span must not depend on the others.
    entry_only
        It reads the input of the first layer alone, as its weights do, for example.
    decides
        The pixels decide how many patches of a span are kept, at least one. It acts in the vision
        tower before the first block alone.
    per_item
        What is kept of a media item depends on that item, its budget and the options alone. The
        author of a class outside of this package says so to let servers run it, which share cached
        items between requests.
    """

    merges: bool = False
    grid: Literal["any", "known", "whole"] = "any"
    batched: bool = False
    entry_only: bool = False
    decides: bool = False
    per_item: bool = False


def is_reducer(value: Any) -> bool:
    """Whether it is a reducer, and not the class of one."""
    return isinstance(getattr(value, "traits", None), Traits) and not isinstance(value, type)


def only_plans(reducer: AnyReducer) -> bool:
    """Whether it has no step: a preset or a composition, which plans others."""
    return not reducer._has_step


def effective(when: Callable[[Any, bool], Any], otherwise: str) -> dict[str, Any]:
    """Metadata of an option that has an effect only with some values of the others.

    Parameters
    ----------
    when
        (reducer, whether it sees pixels: in the vision tower before its first block) → whether the
        option has an effect.
    otherwise
        Why it has none; "{}" is the reducer.
    """
    return {"effective": (when, otherwise)}


def unused_options(reducer: AnyReducer, pixels: bool) -> dict[str, str]:
    """Options that have no effect, by name, and why; see `effective`."""
    unused = {}
    for field in dataclasses.fields(reducer):
        when, why = field.metadata.get("effective", (None, ""))
        if when is not None and not when(reducer, pixels):
            unused[field.name] = why.format(reducer)
    return unused
