"""Stand-ins for objects, with other attributes or other submodules."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class AttributeView:
    """A stand-in for `original` in which some attributes have other values.

    An attention module chooses its backend by its config, and a backend reads the config of the
    module. Views of the config or module change a value for both without changing the original.

    Parameters
    ----------
    original
        The object that provides all other attributes.
    **attributes
        Attributes to override.
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
