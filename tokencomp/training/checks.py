"""Checks of training: useless settings, divergence, and checkpoints of other runs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from tokencomp.errors import OptionError, ScoreError
from tokencomp.patching import unpatched
from tokencomp.storage import check_identity

P = ParamSpec("P")
R = TypeVar("R")


def check_finite(place: str, *values: float) -> None:
    """Raise `ScoreError` if training has diverged: one of `values` is NaN or infinite."""
    if not all(map(math.isfinite, values)):
        raise ScoreError(
            f"training diverged at {place}: loss or gradient is NaN or infinite, nothing is saved. "
            "Lower the learning rate; if the unpatched model's answers are broken too, run it in "
            "bfloat16 or float32."
        )


def check_folder(path: Path) -> None:
    """Raise `OptionError` before the work starts if no folder can be created at `path`."""
    existing = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "is not a folder" if not existing.is_dir() else "cannot be written to"
        raise OptionError(f"cannot write to {path}: {existing} {why}. Give another --output.")


def load_checkpoint(path: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint in `path` to the CPU; None if there is no such file yet.

    Raises `OptionError` if it is of another `identity`, or its folder cannot be written to.
    """
    if path is None:
        return None
    check_folder(path.parent)
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_identity(path, state["identity"], identity)
    return state


def without_patch(train: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorator: suspend the patch of the model (first argument) while the function runs."""

    @functools.wraps(train)
    def run(model: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with unpatched(model):
            return train(model, *args, **kwargs)

    return run
