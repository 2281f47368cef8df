"""The plain data that adapters, the engine and reducers exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp.errors import PlanError

Grid = tuple[int, int, int]
Kind = Literal["image", "video", "audio"]
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
    kind
        "image", "video" or "audio".
    special
        Offsets inside the span of tokens that carry no patch (line breaks, separators). They are
        never scored, merged or dropped unless the whole span goes.
    text
        Offsets inside the span of text between the frames of a video (timestamps). It always
        stays, and it does not count as visual.
    grid_known
        False where nothing tells how the tokens lie in the picture. `grid` is then (1, 1, n), and
        reducers that read places in it (`Reducer.needs_grid`) refuse the span.
    """

    start: int
    length: int
    grid: Grid
    kind: Kind = "image"
    special: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    grid_known: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def visual(self) -> int:
        """Visual tokens of the span, special ones included."""
        return self.length - len(self.text)

    def special_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Boolean mask of the tokens that carry no patch, shape (length,)."""
        return self._mask([*self.special, *self.text], device)

    def text_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Boolean mask of the text between frames, shape (length,)."""
        return self._mask(list(self.text), device)

    def _mask(self, offsets: list[int], device: torch.device | str) -> Tensor:
        mask = torch.zeros(self.length, dtype=torch.bool)
        mask[offsets] = True
        return mask.to(device)


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
        Importance from the signal that the reducer needs.
    query : Tensor, shape (m, d), or None
        Embeddings of the text tokens after the span.
    kind
        "image", "video" or "audio".
    sizes : Tensor of float32, shape (n,), or None
        How many original tokens every row stands for; None: one each.
    keys : Tensor of float32, shape (n, c), or None
        Keys of the vision tower (`TOWER_KEYS`), all heads side by side, mean over a token's
        patches; 0 at special tokens.
    pixels
        (height, width) of a patch where `features` are pixels, before the first block of the vision
        tower: they are the last two axes of `features.view(n, -1, height, width)`. Else None.
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
    kind: Kind = "image"
    sizes: Tensor | None = None
    keys: Tensor | None = None
    pixels: tuple[int, int] | None = None
    place: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def offsets(self) -> Tensor:
        """Offsets inside the uncompressed span, shape (n,)."""
        if self.index is not None:
            return self.index
        return torch.arange(len(self), device=self.features.device)

    def cells(self) -> Tensor:
        """Raster index t·H·W + h·W + w in the uncompressed grid of every live patch, ascending.

        Special tokens never leave, so those before a patch are counted on the live tokens.

        Returns
        -------
        Tensor of int64, shape (patches,)
        """
        before = self.special.cumsum(0)
        return (self.offsets - before)[~self.special]


@dataclass
class Reduction:
    """What a reducer returns for one span.

    Attributes
    ----------
    keep : Tensor of int64, shape (k,)
        Rows of `VisualTokens.features` that stay, ascending; k is exactly the requested count.
    merged : Tensor, shape (k, d), or None
        New content of the kept rows; None keeps them as they are.
    sizes : Tensor of float32, shape (k,), or None
        How many original tokens every kept row stands for.
    """

    keep: Tensor
    merged: Tensor | None = None
    sizes: Tensor | None = None

    def check(self, tokens: VisualTokens, keep: int, reducer: str) -> Reduction:
        """Return this reduction of `tokens` if it keeps exactly `keep` valid rows.

        The values of the rows are checked on the CPU only: on a GPU the host would have to wait.

        Raises
        ------
        PlanError
            `reducer` returned another number of rows, rows that are not ascending row numbers of
            `tokens`, or fewer than all special tokens.
        """
        rows = {t.shape[0] for t in (self.keep, self.merged, self.sizes) if t is not None}
        if rows != {keep}:
            raise PlanError(
                f"reducer {reducer!r} returned {', '.join(map(str, sorted(rows)))} rows of a span "
                f"where {keep} were requested. `reduce(tokens, keep)` must return exactly `keep` "
                "rows, special tokens among them, and as many of `merged` and `sizes`."
            )
        fault = self._fault(tokens)
        if fault:
            raise PlanError(
                f"reducer {reducer!r} returned {fault}. `keep` must be row numbers of "
                "`tokens.features`, int64, ascending, all special tokens among them."
            )
        return self

    def _fault(self, tokens: VisualTokens) -> str:
        """What is wrong with the kept rows, or ""."""
        rows = self.keep
        if rows.dtype != torch.int64 or rows.ndim != 1:
            return f"rows of shape {tuple(rows.shape)} and type {rows.dtype}"
        if rows.device.type != "cpu" or not len(rows):
            return ""
        if bool((rows.diff() <= 0).any()):
            return "rows that are not ascending"
        if rows[0] < 0 or rows[-1] >= len(tokens):
            return f"rows {int(rows[0])} … {int(rows[-1])} of {len(tokens)}"
        lost = int(tokens.special.sum()) - int(tokens.special[rows].sum())
        return f"rows without {lost} of the special tokens" if lost else ""


@dataclass(frozen=True)
class Signal:
    """Something that the engine computes for the reducers that ask for it (`Reducer.needs`).

    Attributes
    ----------
    source
        What the model family must offer (`Adapter.signals`): "query", the embeddings of the text
        after the span; "attention", see `Attention`; "tower", the vision tower's own attention.
    part
        Which part of the source, where there are several.
    """

    source: Literal["query", "attention", "tower"]
    part: str = ""


@dataclass(frozen=True)
class Attention(Signal):
    """The attention that visual tokens receive in a decoder layer beside the stage.

    Attributes
    ----------
    rows
        Query rows whose attention counts: "last" (the last prompt token), "text" (text tokens
        after the span), "all" (every token: column sums of the whole causal map).
    iterations
        0 sums the softmax columns once; n > 0 repeats s ← s·M from the uniform vector (PageRank).
    temperature
        Divides the logits.
    heads
        How the scores of the heads are combined: "mean" or "rms".
    layer
        "previous": the attention map of the layer before the stage (of layer 0 at entry, where
        there is none). "next": that of the layer after the stage, as if it ran on all tokens.
    """

    source: Literal["query", "attention", "tower"] = field(default="attention", init=False)
    part: str = field(default="", init=False)
    rows: Literal["last", "text", "all"] = "last"
    iterations: int = 0
    temperature: float = 1.0
    heads: Literal["mean", "rms"] = "mean"
    layer: Literal["previous", "next"] = "previous"


QUERY = Signal("query")
TOWER_KEYS = Signal("tower", "keys")
TOWER_ATTENTION = Signal("tower", "attention")
TOWER_SIGNALS = frozenset({TOWER_KEYS, TOWER_ATTENTION})


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
