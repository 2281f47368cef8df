"""Calls of the body with features, and of the vision tower, as adapters see them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor, nn

from tokencomp.tokens.signals import Signal
from tokencomp.tokens.spans import Grid, Modality
from tokencomp.tokens.stacks import HostIndex

MODALITIES: dict[int, Modality] = {1: "image", 2: "video", 3: "audio"}
CODES: dict[Modality, int] = {modality: code for code, modality in MODALITIES.items()}


@dataclass
class MediaCall:
    """One forward call with features of media.

    Attributes
    ----------
    modalities : Tensor of int8 on the CPU, shape (B, L)
        0 text, 1 image placeholder, 2 video placeholder, 3 audio placeholder.
    embeds : Tensor, shape (B, L, d)
        Input of the decoder, which contains the features.
    positions : ndarray of int64, shape (3, B, L), or None
        M-RoPE positions (t, h, w); None for models with one position per token.
    body : nn.Module
        The module that inserted the features.
    inputs
        Arguments of its call by name.
    """

    modalities: Tensor
    embeds: Tensor
    positions: np.ndarray[Any, Any] | None
    body: nn.Module
    inputs: Mapping[str, Any] = field(default_factory=dict)
    _rasters: dict[tuple[int, int, int], Grid | None] = field(default_factory=dict, init=False)

    @functools.cached_property
    def runs(self) -> list[list[tuple[int, int, Modality]]]:
        """(start, stop, modality) of every run of equal placeholders, per sample."""
        return runs_of(self.modalities)

    def raster(self, row: int, start: int, stop: int) -> Grid | None:
        """The grid given by M-RoPE positions of columns of a sample; None if they form none.

        Three equal rows are positions of text, and give no grid. Results are cached.
        """
        run = row, start, stop
        if self.positions is None:
            return None
        if run not in self._rasters:
            time, h, w = self.positions[:, row, start:stop]
            alike = len(h) > 1 and np.array_equal(time, h) and np.array_equal(h, w)
            self._rasters[run] = None if alike else raster_grid(h, w)
        return self._rasters[run]


def runs_of(modalities: Tensor) -> list[list[tuple[int, int, Modality]]]:
    """See `MediaCall.runs`."""
    rows = []
    for codes in modalities.tolist():
        runs, start = [], 0
        for code, group in groupby(codes):
            stop = start + sum(1 for _ in group)
            if code:
                runs.append((start, stop, MODALITIES[code]))
            start = stop
        rows.append(runs)
    return rows


def raster_grid(h: HostIndex, w: HostIndex) -> Grid | None:
    """The grid (t, rows, columns) whose raster order has the positions `h` and `w`.

    NumPy, because short tensor operations cost ten times as much.

    Parameters
    ----------
    h, w : ndarray of int64, shape (n,)
        Positions of height and width, from any offset.

    Returns
    -------
    tuple of three int, or None
        None if the positions form no grid.
    """
    n, rows, cols = len(h), int(h.max() - h.min()) + 1, int(w.max() - w.min()) + 1
    raster = np.arange(n)
    regular = n % (rows * cols) == 0 and (
        np.array_equal(h - h[0], raster // cols % rows) and np.array_equal(w - w[0], raster % cols)
    )
    return (n // (rows * cols), rows, cols) if regular else None


@dataclass
class TowerCall:
    """One call of the vision tower: all images, or all videos, of a batch.

    Attributes
    ----------
    values
        By signal, float32, (pictures, rows, d); in packed towers all media are one picture.
    grids : Tensor of int64, shape (media, 3), or None
        (t, h, w) in patches, for towers that take them.
    packing
        Tiles per image, and the other arguments of `Adapter.packer`, if it was called.
    """

    values: dict[Signal, Tensor]
    grids: Any = None
    packing: tuple[list[int], tuple[Any, ...], dict[str, Any]] | None = None
