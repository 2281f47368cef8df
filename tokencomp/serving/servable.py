"""Which reducers servers can run."""

from __future__ import annotations

from typing import Any

from tokencomp.errors import OptionError, TokenCompError, unknown_name
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import available_reducers
from tokencomp.validation import choices, field_types


def check_name(field_name: str, name: Any) -> str:
    """Return the name of a reducer, or of a composition, if a server may run it.

    Raises
    ------
    OptionError
        No text, or an unknown name.
    """
    if not isinstance(name, str):
        names = ", ".join(available_reducers())
        raise OptionError(f"{field_name}={name!r}: expected one of {names}.")
    for part in [part.strip() for part in name.split("+") if part.strip()] or [name]:
        if part not in available_reducers():
            raise OptionError(str(unknown_name(field_name, part, available_reducers())))
    return name


def servable() -> dict[str, str]:
    """Reducers that an engine with fixed placeholder counts can run, and how.

    Returns
    -------
    dict
        Name → "" if the default options can be served, else the option and the values that make it
        so: "signal=norm or novelty or none".
    """
    able = {}
    for name, cls in available_reducers().items():
        if _is_safe(cls):
            able[name] = ""
        elif values := _safe_choices(cls):
            able[name] = values
    return able


def _is_safe(cls: type[Reducer], **options: Any) -> bool:
    """Whether the reducer with these options, and defaults otherwise, can be served."""
    try:
        return cls(**options).serving_safe
    except (TokenCompError, TypeError):  # it has required options, or refuses these
        return False


def _safe_choices(cls: type[Reducer]) -> str:
    """The first option with a fixed list of values of which some, alone, make `cls` safe; or ""."""
    for option, hint in field_types(cls).items():
        values = [v for v in choices(hint) if _is_safe(cls, **{option: v})]
        if values:
            return f"{option}={' or '.join(map(str, values))}"
    return ""


def check_servable(reducer: Reducer) -> Reducer:
    """Return `reducer` if an engine can run it.

    Raises
    ------
    OptionError
        Its keep count, or its choice, depends on more than the media item: on the text, on
        attention, or on a decoder layer. Prefix caches would then mix up questions.
    """
    if reducer.serving_safe and not reducer.needs:
        return reducer
    able = ", ".join(f"{name} with {o}" if o else name for name, o in servable().items())
    raise OptionError(
        f"reducer {reducer.name!r} cannot run inside an engine that fixes placeholder counts "
        f"before the vision tower runs and caches media across questions. These can: {able}. "
        f"Serve {reducer.name!r} with `--engine hf` instead."
    )
