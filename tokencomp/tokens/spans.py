"""The plain data that adapters, the engine and reducers exchange."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokencomp.tokens.signals import Signal

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
        False where nothing tells how the tokens lie in the picture. `grid` is then (1, 1, n), and
        reducers that read places in it (`Reducer.grid`) refuse the span.
    item
        Number of the image, clip or sound in its sample: tiles of one image are several spans of
        one item. While an adapter reads a prompt: any number that the spans of an item share, or
        None for an item of its own (`numbered`).
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
        """Boolean mask of the tokens that carry no patch, shape (length,), for host tables."""
        mask = np.zeros(self.length, dtype=np.bool_)
        mask[[*self.special, *self.text]] = True
        return mask

    def special_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """`fixed_mask` as a tensor."""
        return torch.from_numpy(self.fixed_mask()).to(device)

    def text_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Boolean mask of the text between frames, shape (length,)."""
        mask = torch.zeros(self.length, dtype=torch.bool)
        mask[list(self.text)] = True
        return mask.to(device)


def numbered(spans: Sequence[VisualSpan]) -> list[VisualSpan]:
    """The spans of a sample with the number of their item, from 0 on."""
    result: list[VisualSpan] = []
    for before, span in zip([None, *spans], spans, strict=False):
        number = result[-1].item or 0 if result else 0
        same = before is not None and span.item is not None and span.item == before.item
        result.append(replace(span, item=number if same or not result else number + 1))
    return result


@dataclass
class VisualTokens:
    """What a reducer sees of one span. Plain tensors, never Hugging Face objects.

    Attributes
    ----------
    features : Tensor, shape (n, d)
        Projected features at entry, hidden states between layers; the model's dtype. In the vision
        tower: float32 pixels or hidden states of a cell's patches, see `pixels`.
    grid
        (t, h, w) of the *uncompressed* span.
    special : Tensor of bool, shape (n,)
        True for tokens that must stay.
    index : Tensor of int64, shape (n,), or None
        Offsets of the tokens inside the uncompressed span, ascending. None while none is missing.
    scores : Tensor of float32, shape (n,), or None
        Attention in the decoder, if the reducer needs it (`Attention`).
    query : Tensor, shape (m, d), or None
        Embeddings of the text tokens after the span; between layers, their hidden states.
    query_scores : Tensor of float32, shape (m,), or None
        Lengths of their keys, if the reducer needs `Attention("none")`.
    norm
        The norm behind the last decoder layer, (…, d) to (…, d), if the reducer needs `NORM`.
    frame : Tensor, shape (h · w, d), or None
        The last frame of this shape before the span, also of an earlier turn on the same cache, if
        the reducer needs `FRAMES`.
    modality
        "image", "video" or "audio".
    sizes : Tensor of float32, shape (n,), or None
        How many original tokens every row stands for; None: one each.
    tower : dict
        By `TowerSignal` that the reducer needs, float32, shape (n,) or (n, heads, head_dim); 0 at
        special tokens.
    pixels
        (frames, height, width) of a patch where `features` are pixels, before the first block of
        the vision tower: they are the last three axes of
        `features.view(n, -1, frames, height, width)`. Else None.
    place
        (sample of the batch, span of the sample). For evaluation only: what a reducer chooses must
        not depend on the batch.
    """

    features: Tensor
    grid: Grid
    special: Tensor
    index: Tensor | None = None
    scores: Tensor | None = None
    query: Tensor | None = None
    query_scores: Tensor | None = None
    norm: Norm | None = None
    frame: Tensor | None = None
    modality: Modality = "image"
    sizes: Tensor | None = None
    tower: dict[Signal, Tensor] = field(default_factory=dict)
    pixels: tuple[int, int, int] | None = None
    place: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def offsets(self) -> Tensor:
        """Offsets inside the uncompressed span, shape (n,)."""
        if self.index is not None:
            return self.index
        return torch.arange(len(self), device=self.features.device)


@dataclass
class SpanBatch:
    """What a reducer sees of all spans of a call: their tokens, one span after the other.

    What the host must know to choose shapes (lengths, grids, numbers of special tokens) are plain
    numbers, so that no method has to wait for the device.

    Attributes
    ----------
    features : Tensor, shape (n, d)
    lengths
        Tokens of every span; n in all.
    grids, modalities, places
        As in `VisualTokens`, one per span.
    fixed
        Special tokens of every span.
    special : Tensor of bool, shape (n,), or None
        True for tokens that must stay; None where no span has one.
    index : Tensor of int64, shape (n,), or None
        Offsets of the tokens inside their uncompressed span. None while no token is missing.
    scores, sizes : Tensor of float32, shape (n,), or None
    tower : dict
        As in `VisualTokens`, of all spans.
    queries, query_scores : list of Tensor, or None
        Embeddings of the text after every span, and lengths of keys.
    frames : list of Tensor or None, or None
        `VisualTokens.frame` of every span.
    norm
        As in `VisualTokens`.
    pixels
        As in `VisualTokens`, of all spans.
    """

    features: Tensor
    lengths: list[int]
    grids: list[Grid]
    modalities: list[Modality]
    fixed: list[int]
    special: Tensor | None = None
    index: Tensor | None = None
    scores: Tensor | None = None
    sizes: Tensor | None = None
    tower: dict[Signal, Tensor] = field(default_factory=dict)
    queries: list[Tensor] | None = None
    query_scores: list[Tensor] | None = None
    norm: Norm | None = None
    frames: list[Tensor | None] | None = None
    pixels: tuple[int, int, int] | None = None
    places: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, tokens: VisualTokens) -> SpanBatch:
        """A batch of one span; the number of its special tokens is read from the device."""
        fixed = int(tokens.special.sum())
        return cls(
            features=tokens.features,
            lengths=[len(tokens)],
            grids=[tokens.grid],
            modalities=[tokens.modality],
            fixed=[fixed],
            special=tokens.special if fixed else None,
            index=tokens.index,
            scores=tokens.scores,
            sizes=tokens.sizes,
            tower=tokens.tower,
            queries=None if tokens.query is None else [tokens.query],
            query_scores=None if tokens.query_scores is None else [tokens.query_scores],
            norm=tokens.norm,
            frames=None if tokens.frame is None else [tokens.frame],
            pixels=tokens.pixels,
            places=[tokens.place],
        )

    def spans(self) -> Iterator[VisualTokens]:
        """The spans one by one, as views."""
        start = 0
        for number, length in enumerate(self.lengths):
            rows = slice(start, start + length)
            names = ("features", "special", "index", "scores", "sizes")
            parts = {n: t[rows] for n in names if (t := getattr(self, n)) is not None}
            if self.special is None:
                none = torch.zeros(1, dtype=torch.bool, device=self.features.device)
                parts["special"] = none.expand(length)
            yield VisualTokens(
                **parts,
                grid=self.grids[number],
                tower={signal: values[rows] for signal, values in self.tower.items()},
                query=None if self.queries is None else self.queries[number],
                query_scores=None if self.query_scores is None else self.query_scores[number],
                norm=self.norm,
                frame=None if self.frames is None else self.frames[number],
                modality=self.modalities[number],
                pixels=self.pixels,
                place=self.places[number] if self.places else (0, 0),
            )
            start += length

    @property
    def starts(self) -> list[int]:
        """First row of every span."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    def per_row(self, values: Sequence[int]) -> Tensor:
        """One number per span as one per row, int64, shape (n,)."""
        rows = np.repeat(np.asarray(values, dtype=np.int64), self.lengths)
        return torch.from_numpy(rows).to(self.features.device)

    @property
    def offsets(self) -> Tensor:
        """Offsets inside the uncompressed spans, int64, shape (n,)."""
        if self.index is not None:
            return self.index
        rows = np.concatenate([np.arange(n) for n in self.lengths])
        return torch.from_numpy(rows).to(self.features.device)


@dataclass(frozen=True)
class ModelFacts:
    """What `Reducer.bind` may know of the model: plain values, no Hugging Face object.

    Attributes
    ----------
    mrope
        True if tokens have three rows of positions (time, height, width), False if one each.
    model_type, num_layers, hidden_size
        Of the config; the last two of the text decoder.
    folder
        Folder or hub name that the model was loaded from, or "".
    device, dtype
        Where the weights lie ("cpu" while an offloading hook keeps them away), and their type.
    fingerprint
        Computes what tells checkpoints of one architecture apart (`tokencomp.trained.cards`), or
        None if the weights are quantized or not at hand. Called only to check trained weights.
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
