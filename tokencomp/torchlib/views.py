"""Stand-ins for objects: with other attributes, or with other parts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class AttributeView:
    """A stand-in for `original`, in which some attributes have other values.

    An attention module chooses its backend by its config, and a backend reads the module's config.
    A view of the config or of the module changes a value for both, and leaves the original as
    it is.

    Parameters
    ----------
    original
        The object whose other attributes are read.
    **attributes
        Attributes with values of their own.
    """

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.tokencomp_original = original
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokencomp_original"], name)


def shallow_copy(module: nn.Module) -> Any:
    """A copy that shares parameters and submodules, without the hooks of the original.

    Its submodules can be replaced in `_modules`, and other threads may run the original meanwhile.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.pop("forward", None)  # as accelerate replaces it
    clone.__dict__["_compiled_call_impl"] = None  # of `compile()`, which runs the original
    clone.__dict__["_modules"] = copy.copy(module._modules)
    for name in [n for n in vars(module) if n.startswith(HOOKS)]:
        clone.__dict__[name] = OrderedDict()
    return clone
