"""Copies of modules that share everything with the original but the list of their parts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def shallow_copy(module: nn.Module) -> Any:
    """A copy that shares parameters and submodules, without the hooks of the original.

    Its submodules can be replaced in `_modules`, and other threads may run the original meanwhile.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.pop("forward", None)  # as accelerate replaces it
    clone.__dict__["_modules"] = copy.copy(module._modules)
    for name in [n for n in vars(module) if n.startswith(HOOKS)]:
        clone.__dict__[name] = OrderedDict()
    return clone
