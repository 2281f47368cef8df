"""One value of every stage option, for tests of what carries them."""

from __future__ import annotations

from typing import Any, get_args

from tokencomp.plan.options import OPTIONS, type_of
from tokencomp.validation import choices


def example(name: str) -> tuple[str, Any]:
    """A value that is not off, as it is written on the command line and in Python."""
    kind, off = type_of(name), OPTIONS[name].off
    if bool in (kind, *get_args(kind)):
        return ("off", False) if off is True else ("on", True)
    for value in (*choices(kind), 1, 0.5, 2):
        if type(value) in (kind, *get_args(kind), str) and value != off:
            return str(value), value
    raise TypeError(f"{name}: add a value of type {kind} here")


EXAMPLES = {name: example(name) for name in OPTIONS}
