"""Copies of one model: those of `copy.deepcopy`, in a quarter of its time."""

from __future__ import annotations

import copy
import io
import pickle
from types import FunctionType
from typing import Any

from torch import Tensor, nn


class Stamp:
    """A model that is read once and copied many times.

    The modules and settings are pickled, which runs in C. Tensors are copied as `deepcopy` does,
    each once per copy, so that tied weights stay tied; functions and classes are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[Any] = []
        file = io.BytesIO()
        writer = pickle.Pickler(file, protocol=5)
        writer.persistent_id = self._hold  # type: ignore[method-assign]
        writer.dump(model)
        self._bytes = file.getvalue()

    def _hold(self, found: Any) -> int | None:
        if not isinstance(found, (Tensor, FunctionType, type)):
            return None
        self._held.append(found)
        return len(self._held) - 1

    def copy(self) -> nn.Module:
        """A model that shares no tensor with the others."""
        copies: dict[int, Any] = {}
        reader = pickle.Unpickler(io.BytesIO(self._bytes))
        reader.persistent_load = lambda number: copy.deepcopy(self._held[number], copies)
        return reader.load()
