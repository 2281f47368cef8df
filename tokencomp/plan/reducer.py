"""Properties of reducers that plans need. Reducers make plans, so plans do not import them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

AnyReducer = Any
"""A `tokencomp.Reducer`."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """Fixed properties of a method, for plans, the engine and servers.

    Attributes
    ----------
    merges
        Dropped tokens are merged into kept ones; `Kept.weights` then counts them.
    grid
        Which grid a span must have. "known": it reads positions in the grid, so spans without a
        known grid are refused. "whole": it compares positions of the whole grid, so no earlier
        stage may have dropped tokens.
    batched
        It gets all spans of a call at once, and processes them with one launch per step. What it
        keeps of a span must not depend on the others.
    entry_only
        It only reads the input of the first layer, for which its weights were trained, for example.
    decides
        The pixels decide how many patches of a span are kept, at least one. It acts only in the
        vision tower before the first block.
    per_item
        What is kept of an item depends only on that item, its budget and the options. Authors of
        other packages declare it to let servers run the class, which share cached items between
        requests.
    """

    merges: bool = False
    grid: Literal["any", "known", "whole"] = "any"
    batched: bool = False
    entry_only: bool = False
    decides: bool = False
    per_item: bool = False


def only_plans(reducer: AnyReducer) -> bool:
    """Whether it is a preset or composition, which only plans other reducers."""
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
    """Options without effect, by name, with the reason; see `effective`."""
    unused = {}
    for field in dataclasses.fields(reducer):
        when, why = field.metadata.get("effective", (None, ""))
        if when is not None and not when(reducer, pixels):
            unused[field.name] = why.format(reducer)
    return unused
