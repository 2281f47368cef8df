"""Replaced methods of one object: whatever is installed is taken back exactly.

Nothing here imports torch, because `tokencomp.mlx` does without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Own = TypeVar("Own", bound="Installed")
_ABSENT: Any = object()  # the object had no attribute of its own, only the method of its class


class MethodReplacement:
    """A method of one object that runs another function, from construction to `remove`.

    An attribute of the object itself replaces the method, so that other objects of the class keep
    theirs. If the object has no such method (that of another transformers release, for example),
    nothing is replaced.

    Parameters
    ----------
    owner
        The object, usually a model.
    name
        Name of the method.
    replacement
        Called as `replacement(original, *args, **kwargs)`, where `original(...)` is a call of the
        object as it was before: of its own attribute, if it had one, else of the class's method.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner, self._name, self._replacement = owner, name, replacement
        self._earlier = vars(owner).get(name, _ABSENT)
        self._active = hasattr(owner, name)
        # `vars` instead of setattr: nn.Module treats some values in a way of its own.
        self._installed = functools.partial(self._call)
        if self._active:
            # Transformers reads from the signature which arguments a method takes.
            vars(self._installed)["__wrapped__"] = getattr(owner, name)
            vars(owner)[name] = self._installed

    @staticmethod
    def replaces(value: Any) -> bool:
        """Whether an attribute of an object is what a replacement has put there."""
        function = getattr(value, "func", None)
        return isinstance(getattr(function, "__self__", None), MethodReplacement)

    def remove(self) -> None:
        """Put back what was there; safe to call twice.

        If somebody has replaced the attribute since, theirs stays. It may still call this
        replacement, which from now on only passes calls on to the original.
        """
        own = vars(self._owner)
        installed = own.get(self._name)
        installed = getattr(installed, "__func__", installed)  # accelerate binds what it unwraps
        if self._active and installed is self._installed:
            earlier = self._earlier
            while self.replaces(earlier) and not earlier.func.__self__._active:
                earlier = earlier.func.__self__._earlier  # a replacement removed meanwhile
            if earlier is _ABSENT:
                del own[self._name]
            else:
                own[self._name] = earlier
        self._active = False

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        original: Callable[..., Any] = self._earlier
        if original is _ABSENT:  # looked up in every call, as Python does with methods
            original = functools.partial(getattr(type(self._owner), self._name), self._owner)
        if args and args[0] is self._owner:  # bound to it once more, as accelerate does
            args = args[1:]
        if not self._active:
            return original(*args, **kwargs)
        return self._replacement(original, *args, **kwargs)


class Installed:
    """Something that installs method replacements and hooks, and removes them together.

    They also go when a `with` block of it ends.
    """

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @functools.cached_property
    def _handles(self) -> list[Any]:
        return []

    def remove(self) -> None:
        """Undo `install`, the latest first; safe to call twice."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()
