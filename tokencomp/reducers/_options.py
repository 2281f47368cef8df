"""Options against their annotations: what JSON, a command line or a request hands in is untyped."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tokencomp.errors import OptionError

PLAIN = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def check_types(owner: str, given: Any) -> None:
    """Raise `OptionError` unless every field of the dataclass `given` fits its annotation.

    Checked are bool, int (no bool), float (finite; integers count), str, None, `Literal`, tuples
    (lists count: JSON has no tuples) and unions of these; other annotations are left alone.

    Parameters
    ----------
    owner
        Name in the message.
    """
    for name, hint in hints(given.__class__).items():
        value = getattr(given, name)
        if not fits(value, hint):
            raise OptionError(f"{owner}: {name}={value!r}; expected {told(hint)}.")


@cache
def hints(cls: type) -> dict[str, Any]:
    """Annotations of the fields that the constructor takes."""
    try:
        found = get_type_hints(cls)
    except NameError:  # of a name that only a type checker imports
        return {}
    return {f.name: found[f.name] for f in dataclasses.fields(cls) if f.init}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type."""
    args = get_args(hint)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _finite(value)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in args)
    if get_origin(hint) is Literal:
        return value in args
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(each) == len(value) and all(map(fits, value, each))
    return True


def told(hint: Any) -> str:
    """The annotation in words."""
    args = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(told, args))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, args))
    if get_origin(hint) is tuple:
        return f"a list ({', '.join('…' if a is Ellipsis else told(a) for a in args)})"
    return "None" if hint is NoneType else PLAIN.get(hint, str(hint))


def check_range(owner: str, option: str, value: Any, low: float, high: float) -> None:
    """Raise `OptionError` unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise OptionError(f"{owner}: {option}={value!r}; allowed: a number from {low} to {high}.")


def _finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
