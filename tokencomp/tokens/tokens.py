"""Plain data that adapters, the engine and reducers exchange.

Spans of a prompt (`VisualSpan`), facts of a model (`ModelFacts`), what a reducer gets (`Tokens`)
and what it returns (`Kept`).

Lengths, budgets and grid positions are numbers on the host. Index tables that follow from them are
computed there and moved to the device in one copy, so that the number of launches does not depend
on the number of spans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import PlanError, deprecated
from tokencomp.tokens.signals import Signal
from tokencomp.tokens.stacks import HostIndex

Grid = tuple[int, int, int]
Modality = Literal["image", "video", "audio"]
MODALITIES: dict[int, Modality] = {1: "image", 2: "video", 3: "audio"}
CODES: dict[Modality, int] = {modality: code for code, modality in MODALITIES.items()}
Norm = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")
# What a reducer has kept last at every cell of pictures of (h, w) cells, (h · w, d); NaN: nothing.
# Its keys are those of `Tokens.keys`: (h, w), or the place of a tile.
LastKept = dict[tuple[Any, ...], Tensor]


@dataclass(frozen=True)
class VisualSpan:
    """A run of visual positions of one grid (an image, an image tile, or a video) in one sample.

    It has the columns `start … start + length - 1` of the uncompressed sequence of this forward
    call. Clips of audio are spans as well, with a grid of (tokens, 1, 1).
    """

    start: int
    length: int  # t * h * w + len(special) + len(text)
    grid: Grid  # (t, h, w) after the projector
    modality: Modality = "image"
    # Offsets inside the span of tokens that carry no patch (line breaks, separators). They are
    # never scored, merged or dropped unless the whole span goes.
    special: tuple[int, ...] = ()
    # Offsets inside the span of text between the frames of a video (timestamps). It always stays,
    # and it does not count as visual.
    text: tuple[int, ...] = ()
    # False if the grid of the tokens is unknown. `grid` is then (1, 1, n), and reducers that read
    # places in it (`Traits.grid`) refuse the span.
    grid_known: bool = True
    # First column of the image, clip or sound that the span is part of: tiles of one image, and
    # frames of a clip with text between them, can be several spans of one item. None becomes
    # `start`: the span is the whole item.
    item: int | None = field(default=None, compare=False)
    tile: int = field(default=0, compare=False)  # number of the span in its picture
    stop: int = field(init=False, repr=False, compare=False)  # the column after the last
    # Visual tokens of the span, special ones included.
    visual: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", self.start + self.length)
        object.__setattr__(self, "visual", self.length - len(self.text))
        if self.item is None:
            object.__setattr__(self, "item", self.start)

    def fixed_mask(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Boolean mask of special tokens and text between frames, shape (length,), NumPy."""
        mask = np.zeros(self.length, dtype=np.bool_)
        mask[[*self.special, *self.text]] = True
        return mask

    def special_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """`fixed_mask` as a tensor."""
        return torch.from_numpy(self.fixed_mask()).to(device)


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model for `Reducer.bind`: plain values, no Hugging Face object."""

    mrope: bool  # whether tokens have three rows of positions (time, height, width), or one each
    model_type: str = ""
    num_layers: int = 0  # of the text decoder, as the hidden size
    hidden_size: int = 0
    folder: str = ""  # folder or hub name that the model was loaded from, or ""
    device: torch.device = CPU  # of the weights ("cpu" while an offloading hook holds them)
    dtype: torch.dtype = torch.float32  # of the weights
    # Computes a fingerprint of the checkpoint (`tokencomp.trained.cards`), or None if the weights
    # are quantized or not available. Called only to check trained weights.
    fingerprint: Callable[[], list[float] | None] = field(
        default=lambda: None, repr=False, compare=False
    )


@dataclass
class Tokens:
    """The patches of all spans of a call, one span after the other. Iterating gives span by span.

    Special tokens and text between frames are no patches: they are kept without the reducer.
    Plain tensors and numbers, never Hugging Face objects. What the host must know to choose shapes
    are numbers, so that no method has to wait for the device.

    Attributes
    ----------
    features : Tensor, shape (n, d)
        Projected features at entry, hidden states between layers; the model's dtype. In the vision
        tower: float32 pixels or hidden states of a cell's patches, see `pixels`.
    grids
        (t, h, w) of every *uncompressed* span.
    budgets
        Patches to keep of every span: at least one, and fewer than all.
    lengths
        Patches of every span, n in all; by default all of its grid.
    modalities
        "image", "video" or "audio" of every span; by default "image".
    index : Tensor of int64, shape (n,), or None
        Raster number of every patch in the grid of its span, ascending. None: none is missing.
    weights : Tensor of float32, shape (n,), or None
        How many original tokens every patch represents; None: one each.
    scores : Tensor of float32, shape (n,), or None
        Attention in the decoder, if the reducer needs it (`Attention`).
    tower : dict
        By `TowerSignal` that the reducer needs, float32, shape (n,) or (n, heads, head_dim).
    queries : list of Tensor, shape (m, d), or None
        Embeddings of the text tokens after every span; between layers, their hidden states.
    query_scores : list of Tensor of float32, shape (m,), or None
        Lengths of their keys, if the reducer needs `Attention("none")`.
    norm
        The norm after the last decoder layer, (…, d) to (…, d), if the reducer needs `NORM`.
    frames : list of (Tensor, shape (h · w, d), or None), or None
        Features of the last frame of the same shape before every span, also of an earlier turn on
        the same cache, to compare `features` with, if the reducer needs `FRAMES`. NaN where the
        cache no longer holds it.
    pixels
        (frames, height, width) of a patch where `features` are pixels, before the first block of
        the vision tower: they are the last three axes of
        `features.view(n, -1, frames, height, width)`. Else None.
    levels : Tensor, shape (channels,), or None
        Where `features` are pixels: how much they grow from one of 256 levels to the next, in
        every channel.
    seen : list of dict, or None
        What was kept last, of every span, if the reducer needs `SEEN`. The reducer writes what it
        keeps, for later spans: pictures that follow each other in a prompt share a dict.
    keys
        Of every span, with `seen`: spans of equal keys show the same place of pictures of one size.
    span_ids
        (sample of the batch, span of the sample) of every span. For evaluation only: what a
        reducer chooses must not depend on the batch.
    """

    features: Tensor
    grids: list[Grid]
    budgets: list[int]
    lengths: list[int] = field(default_factory=list)
    modalities: list[Modality] = field(default_factory=list)
    index: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    tower: dict[Signal, Tensor] = field(default_factory=dict)
    queries: list[Tensor] | None = None
    query_scores: list[Tensor] | None = None
    norm: Norm | None = None
    frames: list[Tensor | None] | None = None
    pixels: tuple[int, int, int] | None = None
    levels: Tensor | None = None
    seen: list[LastKept] | None = None
    keys: list[tuple[Any, ...]] = field(default_factory=list)
    span_ids: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [math.prod(grid) for grid in self.grids]
        self.modalities = self.modalities or ["image" for _ in self.grids]
        self.keys = self.keys or [(h, w) for _, h, w in self.grids]

    def __len__(self) -> int:
        """Number of spans."""
        return len(self.grids)

    def __iter__(self) -> Iterator[Tokens]:
        """The spans one by one, as views."""
        for i, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            rows, one = slice(start, start + length), slice(i, i + 1)
            changes: dict[str, Any] = {"lengths": [length]}
            for name in ("features", "index", "weights", "scores"):
                changes[name] = None if (v := getattr(self, name)) is None else v[rows]
            for name in ("queries", "query_scores", "frames", "seen"):
                changes[name] = None if (v := getattr(self, name)) is None else v[one]
            for name in ("grids", "budgets", "modalities", "keys", "span_ids"):
                changes[name] = getattr(self, name)[one]
            tower = {signal: values[rows] for signal, values in self.tower.items()}
            yield replace(self, tower=tower, **changes)

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def starts(self) -> list[int]:
        """First patch of every span."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    def check_whole(self, reducer: str) -> None:
        """Raise `PlanError` if an earlier stage has dropped patches of a span."""
        for (t, h, w), length in zip(self.grids, self.lengths, strict=True):
            if length != t * h * w:
                raise PlanError(
                    f"reducer {reducer!r} compares places of a whole {t}×{h}×{w} grid, but "
                    f"{length} of its tokens are left. Use it at decoder entry (layer 0)."
                )

    # -- per patch ------------------------------------------------------------------------------

    def table(self, values: Any) -> Tensor:
        """Integers on the host as an int64 tensor on the device."""
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device)

    def per_patch(self, values: Sequence[int]) -> Tensor:
        """Repeat one number per span for each of its patches, int64, shape (n,)."""
        return self.table(np.repeat(np.asarray(values, dtype=np.int64), self.lengths))

    def owners(self) -> Tensor:
        """The span of every patch, int64, shape (n,)."""
        return self.per_patch(range(len(self)))

    def all_weights(self) -> Tensor:
        """Number of original tokens that every patch represents, float32, shape (n,)."""
        if self.weights is None:
            return torch.ones(len(self.features), device=self.features.device)
        return self.weights

    # -- places in the grid ---------------------------------------------------------------------

    def cells(self) -> Tensor:
        """Raster number in its grid of every patch, int64, shape (n,)."""
        if self.index is None:
            return self.table(np.concatenate([np.arange(length) for length in self.lengths]))
        return self.index

    def host_cells(self) -> list[HostIndex]:
        """`cells` of every span on the host; read from the device only if patches are missing."""
        if self.index is None:
            return [np.arange(length) for length in self.lengths]
        return np.split(self.index.cpu().numpy(), np.cumsum(self.lengths[:-1]))

    def per_frame(self) -> list[list[int]]:
        """Number of patches in every frame of every span; a device read if some are missing."""
        frames = [[h * w] * t for t, h, w in self.grids]
        if self.index is None:
            return frames
        first = list(itertools.accumulate(map(len, frames), initial=0))
        areas = self.per_patch([h * w for _, h, w in self.grids])
        frame = self.index // areas + self.per_patch(first[:-1])
        counts = torch.bincount(frame, minlength=first[-1]).tolist()
        return [counts[a:b] for a, b in itertools.pairwise(first)]

    def frame_lengths(self) -> list[int]:
        """Patches of every frame of all spans, which must be whole."""
        return [h * w for t, h, w in self.grids for _ in range(t)]


@dataclass
class Kept:
    """The patches that a reducer keeps of `Tokens`.

    Attributes
    ----------
    patches : Tensor of int64, shape (k,)
        Numbers of the kept patches in `Tokens`, ascending: of every span exactly its budget.
    features : Tensor, shape (k, d), or None
        New features of these patches, in any floating dtype; None: unchanged.
    weights : Tensor of float32, shape (k,), or None
        How many original tokens every kept patch represents; None: unchanged.
    """

    patches: Tensor
    features: Tensor | None = None
    weights: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Deprecated name of `patches`."""
        deprecated("Kept.rows", "Kept.patches", gone_in="0.3")
        return self.patches

    @classmethod
    def ascending(cls, patches: Tensor, features: Tensor, weights: Tensor) -> Kept:
        """`Kept` of patches in any order, with new features and weights in the same order."""
        patches, order = patches.sort()
        return cls(patches, features.index_select(0, order), weights.index_select(0, order))

    @classmethod
    def joined(cls, parts: Sequence[Kept], tokens: Tokens) -> Kept:
        """Join the results of all spans of `tokens`; `parts` has one entry per span.

        If only some of them merge, the others keep their features and weights.
        """
        pairs = zip(parts, tokens.starts, strict=True)
        patches = torch.cat([part.patches + first for part, first in pairs])
        features = _joined([p.features for p in parts], tokens, patches, tokens.features)
        weights = _joined([p.weights for p in parts], tokens, patches, tokens.all_weights())
        return cls(patches, features, weights)

    def with_fixed(self, features: Tensor, patches: Tensor, fixed: Tensor) -> Kept:
        """Extend a choice among the rows `patches` of `features` (m, d) by the rows `fixed`.

        Fixed rows keep their features, and get weight 1 if there are weights: only patches are
        merged. `patches` and `fixed` are int64, ascending.
        """
        rows = torch.cat([fixed, patches.index_select(0, self.patches.to(patches.device))])
        rows, order = rows.sort()
        x, weights = self.features, self.weights
        if x is not None:
            x = torch.cat([features.index_select(0, fixed).to(x), x]).index_select(0, order)
        if weights is not None:
            weights = torch.cat([weights.new_ones(len(fixed)), weights]).index_select(0, order)
        return Kept(rows, x, weights)


def _joined(
    parts: Sequence[Tensor | None], tokens: Tokens, rows: Tensor, before: Tensor
) -> Tensor | None:
    """Concatenate the parts of all spans, with `before` in place of parts that are None."""
    if all(part is None for part in parts):
        return None
    pairs = zip(parts, before[rows].split(tokens.budgets), strict=True)
    return torch.cat([old if part is None else part.to(old) for part, old in pairs])


def rows_where(mask: Tensor, count: int) -> Tensor:
    """The `count` rows at which mask (n,), bool or uint8, holds, ascending, int64.

    By a sort, because the length of `nonzero` would have to be read from the device.
    """
    return mask.to(torch.uint8).sort(descending=True, stable=True).indices[:count]


def evenly(n: int, k: int) -> HostIndex:
    """Indices floor((i + ½)·n/k) of k of n items."""
    steps = np.arange(k)
    return (2 * steps + 1) * n // (2 * max(k, 1))
