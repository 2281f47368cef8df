"""Integer tables that are built on the host and move to a device in one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class HostTables:
    """Integer tables that are built on the host and move to a device in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[Any] = []
        self._moved: Sequence[Tensor] = ()

    def add(self, values: Any) -> Callable[[], Tensor]:
        """Add a table, or nothing for None; returns what gives it, int64, once it has moved."""
        number = len(self._parts)
        if values is not None:
            self._parts.append(np.asarray(values, dtype=np.int64))
        return lambda: self._moved[number]

    def move(self) -> None:
        """Copy all tables to the device."""
        if self._parts:
            packed = torch.from_numpy(np.concatenate(self._parts)).to(self.device)
            self._moved = packed.split([len(part) for part in self._parts])
