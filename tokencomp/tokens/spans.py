"""Plain data that adapters, the engine and reducers exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int, int]
Modality = Literal["image", "video", "audio"]
Norm = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class VisualSpan:
    """A run of visual positions of one grid (an image, an image tile, or a video) in one sample.

    Clips of audio are spans as well, with a grid of (tokens, 1, 1).

    Attributes
    ----------
    start, length
        Columns `start … start + length - 1` of the uncompressed sequence of this forward call.
    grid
        (t, h, w) after the projector; `t * h * w + len(special) + len(text) == length`.
    modality
        "image", "video" or "audio".
    special
        Offsets inside the span of tokens that carry no patch (line breaks, separators). They are
        never scored, merged or dropped unless the whole span goes.
    text
        Offsets inside the span of text between the frames of a video (timestamps). It always
        stays, and it does not count as visual.
    grid_known
        False if the grid of the tokens is unknown. `grid` is then (1, 1, n), and
        reducers that read places in it (`Reducer.grid`) refuse the span.
    item
        Number of the image, clip or sound in its sample: tiles of one image are several spans of
        one item. While an adapter reads a prompt: any number that the spans of an item share, or
        None for an item with one span (`numbered`).
    """

    start: int
    length: int
    grid: Grid
    modality: Modality = "image"
    special: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    grid_known: bool = True
    item: int | None = field(default=None, compare=False)

    @cached_property
    def stop(self) -> int:
        return self.start + self.length

    @cached_property
    def visual(self) -> int:
        """Visual tokens of the span, special ones included."""
        return self.length - len(self.text)

    def fixed_mask(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Boolean mask of special tokens and text between frames, shape (length,), NumPy."""
        mask = np.zeros(self.length, dtype=np.bool_)
        mask[[*self.special, *self.text]] = True
        return mask

    def special_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """`fixed_mask` as a tensor."""
        return torch.from_numpy(self.fixed_mask()).to(device)


def numbered(spans: Sequence[VisualSpan]) -> list[VisualSpan]:
    """The spans of a sample with consecutive item numbers from 0."""
    result: list[VisualSpan] = []
    for before, span in zip([None, *spans], spans, strict=False):
        number = result[-1].item or 0 if result else 0
        same = before is not None and span.item is not None and span.item == before.item
        result.append(replace(span, item=number if same or not result else number + 1))
    return result


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model for `Reducer.bind`: plain values, no Hugging Face object.

    Attributes
    ----------
    mrope
        True if tokens have three rows of positions (time, height, width), False if one each.
    model_type, num_layers, hidden_size
        Of the config; the last two of the text decoder.
    folder
        Folder or hub name that the model was loaded from, or "".
    device, dtype
        Device of the weights ("cpu" while an offloading hook holds them), and their dtype.
    fingerprint
        Computes a fingerprint of the checkpoint (`tokencomp.trained.cards`), or None if the weights
        are quantized or not available. Called only to check trained weights.
    """

    mrope: bool
    model_type: str = ""
    num_layers: int = 0
    hidden_size: int = 0
    folder: str = ""
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    fingerprint: Callable[[], list[float] | None] = field(
        default=lambda: None, repr=False, compare=False
    )
