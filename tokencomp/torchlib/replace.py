"""Replace methods of single objects and restore them exactly; and stand-ins for objects.

This module does not import torch, because `tokencomp.mlx` runs without it.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

Own = TypeVar("Own", bound="Installed")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT: Any = object()  # the object had no instance attribute, only the method of its class


class MethodReplacement:
    """Replaces the method `name` of one object, from construction to `remove`.

    An instance attribute shadows the method of the class, so other objects are not affected. If the
    object has no such method (as in another transformers release), nothing is replaced. Calls run
    `replacement(original, *args, **kwargs)`, where `original(...)` calls what the object had
    before: an instance attribute, or the method of its class.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner, self._name, self._replacement = owner, name, replacement
        self._earlier = vars(owner).get(name, _ABSENT)
        self._active = hasattr(owner, name)
        # `vars` instead of setattr, which nn.Module overrides.
        self._installed = functools.partial(self._call)
        if self._active:
            # Transformers reads from the signature which arguments a method takes.
            vars(self._installed)["__wrapped__"] = getattr(owner, name)
            vars(owner)[name] = self._installed

    @staticmethod
    def replaces(value: Any) -> bool:
        """Whether an attribute value is a `MethodReplacement`."""
        function = getattr(value, "func", None)
        return isinstance(getattr(function, "__self__", None), MethodReplacement)

    def remove(self) -> None:
        """Restore the previous attribute; safe to call twice.

        If other code has replaced the attribute since, it is not touched. It may still call this
        replacement, which then only calls the original.
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
        if original is _ABSENT:  # looked up at every call, like a method
            original = functools.partial(getattr(type(self._owner), self._name), self._owner)
        if args and args[0] is self._owner:  # accelerate has bound it again
            args = args[1:]
        if not self._active:
            return original(*args, **kwargs)
        return self._replacement(original, *args, **kwargs)


class Installed:
    """Base of classes that install method replacements and hooks, and remove them together.

    Also a context manager that removes them at its end.
    """

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @functools.cached_property
    def _handles(self) -> list[Any]:
        return []

    def remove(self) -> None:
        """Remove everything that was installed, in reverse order; safe to call twice."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()


# -- stand-ins with other attributes or other submodules -----------------------------------------


class AttributeView:
    """A stand-in for `original` in which some attributes have other values.

    An attention module chooses its backend by its config, and a backend reads the config of the
    module. Views of the config or module change a value for both without changing the original.
    """

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.tokencomp_original = original
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokencomp_original"], name)


def shallow_copy(module: nn.Module) -> Any:
    """Copy a module without its hooks; parameters and submodules are shared.

    Submodules of the copy can be replaced in `_modules` while other threads run the original.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.pop("forward", None)  # accelerate's replacement
    clone.__dict__["_compiled_call_impl"] = None  # set by `compile()`; it runs the original
    clone.__dict__["_modules"] = copy.copy(module._modules)
    for name in [n for n in vars(module) if n.startswith(HOOKS)]:
        clone.__dict__[name] = OrderedDict()
    return clone
