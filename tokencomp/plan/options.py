"""Options of stages and of reducers, and which arguments of a method cannot be combined.

`patch`, `Handle.set`, plans and their JSON form, settings of evaluations, servers and the command
line iterate over the fields of `StageOptions`. An option is added by its field here and by what it
does in `choose_patches` (CONTRIBUTING.md, "Add an option of a stage").
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from tokencomp.errors import OptionError
from tokencomp.validation import choices, describe_type, fits

AnyReducer = Any
"""A `tokencomp.Reducer`."""
Merging = bool | Literal["auto"]


# -- reducers, which make plans: plans do not import them ------------------------------------------


@dataclass(frozen=True)
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
    """Whether it only plans stages of other reducers, as compositions and `aim` do."""
    return not reducer._has_step


def effective(when: Callable[[Any, bool], Any], otherwise: str) -> dict[str, Any]:
    """Metadata of an option that has an effect only with some values of the others.

    `when` says whether it has one, from the reducer and whether that sees pixels (in the vision
    tower before its first block). `otherwise` says why it has none; "{}" is the reducer.
    """
    return {"effective": (when, otherwise)}


def unused_options(reducer: AnyReducer, pixels: bool) -> dict[str, str]:
    """Options without effect, by name, with the reason; see `effective`."""
    unused = {}
    for option in fields(reducer):
        when, why = option.metadata.get("effective", (None, ""))
        if when is not None and not when(reducer, pixels):
            unused[option.name] = why.format(reducer)
    return unused


# -- options of stages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What is known of an option besides the annotation of its field."""

    off: Any  # the value without effect, which the JSON form of a plan leaves out
    help: str  # its line on the command line
    # Returns the value of an option that the user left out, for the reducer that the user gave
    # ("auto", a name or a `Reducer`). By default that is `off`.
    usual: Callable[[Any], Any] | None = None
    # Called with a value of the right type and the reducer of the stage (None: not known). Raises
    # `OptionError` for a value that is out of range, or that the reducer does not allow.
    check: Callable[[Any, AnyReducer | None], None] | None = None
    # Its values in tables and in the repr of a handle; by default "name=value".
    words: Mapping[Any, str] = field(default_factory=dict)
    # Whether rows represent several tokens, so that attention must count them as often: refused
    # where an engine cannot.
    weighs: bool = False

    def meaning(self, reducer: Any) -> Any:
        """The value that None stands for with this reducer ("auto", a name or a `Reducer`)."""
        return self.off if self.usual is None else self.usual(reducer)


LEAST_MERGED = 0.1
"""Fraction of an image below which merge="auto" drops: a mean of more than ten tokens says too
little. Videos merge at every ratio (docs/decisions/0001-default-reducer.md, round 10)."""


def _check_merge(merge: Merging, reducer: AnyReducer | None) -> None:
    if merge and reducer is not None and reducer.traits.merges:
        raise OptionError(
            f"merge={merge!r}: {reducer.name!r} merges tokens by itself, so there are none left "
            "to merge. Leave merge out, or take a reducer that does not merge, such as 'kcenter'."
        )


MERGE = Option(
    off=False,
    help="Average dropped tokens into their nearest kept token, which then weighs as much as all "
    "of them (on), or drop them (off); auto merges in videos, and in images that keep at least "
    "a tenth. By default auto for the default reducer, and off for others.",
    usual=lambda reducer: "auto" if reducer == "auto" else False,
    check=_check_merge,
    words={True: "merging the rest", "auto": "merging the rest of videos, and of images up to 0.9"},
    weighs=True,
)


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The options of a stage. Stages and methods derive from it.

    Attributes
    ----------
    merge
        Whether tokens that the reducer does not keep are averaged into the kept token nearest to
        them, which then weighs as much as the tokens it represents, or dropped (False). Where no
        token of a span is kept, all are dropped. "auto" merges in videos and in images that keep at
        least a tenth, and drops elsewhere. None in a method: "auto" for the default reducer, else
        False.
    """

    merge: Merging | None = field(default=None, metadata={"option": MERGE})

    def merges(self, modality: str, fraction: float) -> bool:
        """Whether dropped tokens of an item that keeps `fraction` are merged."""
        if self.merge != "auto":
            return bool(self.merge)
        return modality == "video" or (modality == "image" and fraction >= LEAST_MERGED - 1e-9)

    @property
    def given_options(self) -> dict[str, Any]:
        """The options that are not None."""
        return {name: v for name in OPTIONS if (v := getattr(self, name)) is not None}

    @property
    def options_in_force(self) -> dict[str, Any]:
        """All options by name; None is replaced by `Option.off`."""
        return {name: known.off for name, known in OPTIONS.items()} | self.given_options

    @property
    def stage_options(self) -> dict[str, Any]:
        """The options that have an effect: the JSON form."""
        return {n: v for n, v in self.options_in_force.items() if v != OPTIONS[n].off}

    def check_options(self, reducer: AnyReducer | None) -> None:
        """Check the options of a stage with this reducer; None: it is not known.

        Raises
        ------
        OptionError
            A value of another type, or one that `Option.check` refuses.
        """
        for name, value in self.options_in_force.items():
            check_option(name, value, reducer)


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(StageOptions)}


def check_option(name: str, value: Any, reducer: AnyReducer | None) -> None:
    """Check one option as `StageOptions.check_options` does."""
    kind = type_of(name)
    if not fits(value, kind):
        truth = bool in (kind, *get_args(kind))
        values = ["True, False"] * truth + [repr(c) for c in choices(kind)]
        allowed = ", ".join(values) or describe_type(kind)
        raise OptionError(f"{name}={value!r}; allowed: {allowed}.")
    if (check := OPTIONS[name].check) is not None:
        check(value, reducer)


@functools.cache
def type_of(name: str) -> Any:
    """The annotation of an option without None."""
    hint = get_type_hints(StageOptions)[name]
    return functools.reduce(operator.or_, [k for k in get_args(hint) if k is not NoneType])


def in_words(options: Mapping[str, Any]) -> list[str]:
    """Options of a stage as tables and reprs name them, e.g. ["merging the rest"]."""
    return [OPTIONS[name].words.get(v, f"{name}={v!r}") for name, v in options.items()]


def split(
    options: Mapping[str, Any], names: Container[str] = OPTIONS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of these names, by default options of stages, and those of the reducer."""
    named = {name: value for name, value in options.items() if name in names}
    return named, {name: value for name, value in options.items() if name not in names}


# One of the first arguments cannot be combined with one of the second, and why. "ratios" is a ratio
# by modality.
EXCLUSIVE: tuple[tuple[set[str], set[str], str], ...] = (
    ({"ratio", "ratios"}, {"budget"}, "a budget says in tokens what a ratio says as a fraction"),
    ({"plan"}, {"ratio", "ratios", "budget"}, "a plan contains its fractions"),
    (
        {"speedup"},
        {"ratio", "ratios", "budget", "plan", "tower_ratio"},
        "a speedup sets how much the vision tower and the decoder drop",
    ),
    (
        {"plan"},
        {"reducer", "options", *OPTIONS, "tower_ratio", "tower_reducer"},
        "a plan names its reducers, with their options, in its stages",
    ),
    ({"tower_ratio"}, {"ratios"}, "the tower keeps the same fraction of every modality"),
)


def check_exclusive(given: Mapping[str, Any]) -> None:
    """Raise `OptionError` if two of the arguments that were given cannot be combined."""
    words = {n: f"{'ratio' if n == 'ratios' else n}={value!r}" for n, value in given.items()}
    if "plan" in given:
        words["plan"] = "plan=..."
    for some, others, why in EXCLUSIVE:
        one, two = ([words[name] for name in words if name in names] for names in (some, others))
        if one and two:
            raise OptionError(f"{one[0]} together with {', '.join(two)}: {why}. Leave one out.")


def one_amount(ratio: Any, budget: Any, plan: Any = None, speedup: Any = None) -> dict[str, Any]:
    """The one of ratio, budget and speedup that is not None, as an argument; {} for none.

    `OptionError` if more than one of the four is given.
    """
    asked = {"ratio": ratio, "budget": budget, "plan": plan, "speedup": speedup}
    given = {name: value for name, value in asked.items() if value is not None}
    check_exclusive(given)
    given.pop("plan", None)
    return given
