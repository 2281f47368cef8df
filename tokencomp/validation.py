"""Checks of option values, which are untyped when they come from JSON, a shell or a request."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tokencomp.errors import OptionError

PLAIN = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def check_types(owner: str, options: Any) -> None:
    """Raise `OptionError` unless every field of the dataclass `options` fits its annotation.

    Fields annotated with bool, int, float (finite; integers count), str, None, `Literal`, tuples
    (lists count: JSON has no tuples) and unions of these are checked.
    """
    for name, hint in field_types(options.__class__).items():
        value = getattr(options, name)
        if not fits(value, hint):
            raise OptionError(f"{owner}: {name}={value!r}; expected {describe_type(hint)}.")


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Annotations of the fields that the constructor of a dataclass takes."""
    try:
        hints = get_type_hints(cls)
    except NameError:  # an annotation that only a type checker can resolve
        return {}
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type."""
    args = get_args(hint)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # false for NaN; integers may be larger
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, member) for member in args)
    if get_origin(hint) is Literal:
        return value in args
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            return False
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(hints) == len(value) and all(map(fits, value, hints))
    return True


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a `Literal` annotation, alone or inside a union, lists."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(value for member in get_args(hint) for value in choices(member))
    return ()


def describe_type(hint: Any) -> str:
    """The annotation in words, for error messages."""
    args = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(describe_type, args))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, args))
    if get_origin(hint) is tuple:
        return f"a list ({', '.join('…' if a is Ellipsis else describe_type(a) for a in args)})"
    return "None" if hint is NoneType else PLAIN.get(hint, str(hint))


def check_effect(owner: str, options: Any, unused: Mapping[str, str]) -> None:
    """Raise `OptionError` if an option of the dataclass object `options` is set without effect.

    `unused` has the fields that have none, and why. A field at its default counts as not set.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name, reason in unused.items():
        if (value := getattr(options, name)) != defaults[name]:
            raise OptionError(f"{owner}: {name}={value!r} has no effect {reason}. Leave it out.")


def check_choice(owner: str, option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise `OptionError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise OptionError(f"{owner}: {option}={value!r}; allowed: {', '.join(map(repr, allowed))}.")


def between(low: float, high: float) -> dict[str, Any]:
    """Metadata of a dataclass field that takes numbers from low to high, see `check_ranges`."""
    return {"range": (low, high)}


def check_ranges(owner: str, options: Any) -> None:
    """Raise `OptionError` unless the fields of `options` are in the ranges of their metadata."""
    for field in dataclasses.fields(options):
        if "range" not in field.metadata:
            continue
        (low, high), value = field.metadata["range"], getattr(options, field.name)
        if not low <= value <= high:
            raise OptionError(
                f"{owner}: {field.name}={value!r}; allowed: a number from {low} to {high}."
            )
