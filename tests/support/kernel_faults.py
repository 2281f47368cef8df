"""Faults of Triton forms, as a card may have them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

WRONG = ("sign", "tail", "dtype", "raise")
ENDS = ("hang", "killed")


def broken(kind: str, form: Callable[..., Any]) -> Callable[..., Any]:
    """A form with a fault."""

    def run(*args: Any) -> Any:
        if kind == "raise":
            raise RuntimeError("out of resource: shared memory, Required: 300000")
        if kind == "hang":
            time.sleep(600)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGSEGV)
        return torch.utils._pytree.tree_map(lambda x: _changed(kind, x), form(*args))

    return run


def _changed(kind: str, x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or not x.numel():
        return x
    if kind == "sign":
        return ~x if x.dtype == torch.bool else -x - 1
    if kind == "dtype":
        return x.to(torch.float64 if x.is_floating_point() else torch.int32)
    x = x.contiguous().clone()
    x.view(-1)[-1] += 1  # a tail that no program has written
    return x
