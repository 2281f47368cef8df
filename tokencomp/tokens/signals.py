"""Signals: what the engine computes for reducers that need more than features and grids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["query", "attention", "tower", "norm", "frames", "seen"]


@dataclass(frozen=True)
class Signal:
    """Something that the engine computes for the reducers that ask for it (`Reducer.needs`)."""

    # What the model family must offer (`Adapter.signals`): "query", the embeddings of the text
    # after the span (between layers, its hidden states); "attention", see `Attention`; "tower", see
    # `TowerSignal`; "norm", the norm after the last decoder layer, as a function; "frames", the
    # last frame before the span, also of an earlier turn on the same cache; "seen", the pixels that
    # a stage in the vision tower kept last at every place, likewise.
    source: Source


@dataclass(frozen=True)
class Attention(Signal):
    """The attention that visual tokens receive in a decoder layer next to the stage."""

    source: Source = field(default="attention", init=False)
    # Query rows whose attention counts: "last" (the last prompt token), "text" (text tokens after
    # the span), "raters" (those after the last span that the visual tokens resemble most, see
    # `tokencomp.reducers.sparsevlm`), "all" (every token: column sums of the whole causal map),
    # "none" (no row: the score of a token is the length of its key, the sum of absolute values over
    # all heads before rotation, and so for the text in `Tokens.query_scores`).
    rows: Literal["last", "text", "raters", "all", "none"] = "last"
    # 0 sums the softmax columns once; n > 0 repeats s ← s·M from the uniform vector (PageRank).
    iterations: int = 0
    temperature: float = 1.0  # divides the logits
    heads: Literal["mean", "rms"] = "mean"  # how the scores of the heads are combined
    # "previous": the attention map of the layer before the stage (of layer 0 at entry, where there
    # is none). "next": the map of the layer after the stage, as if it ran on all tokens.
    layer: Literal["previous", "next"] = "previous"
    # Media that call for it: prompts without any of them are not scored.
    modalities: frozenset[str] = frozenset({"image", "video", "audio"})


@dataclass(frozen=True)
class TowerSignal(Signal):
    """What a block of the vision tower says about visual tokens: the mean over their patches."""

    source: Source = field(default="tower", init=False)
    # "attention": the attention that a patch receives, mean over heads, (n,): from the class token
    # where the tower has one, else the mean over all patches that may attend to it. "keys": keys
    # before any rotation, (n, heads, head_dim).
    part: Literal["attention", "keys"] = "attention"
    # Which block, of those whose output the model uses: 0, 1, … from the first on, -1, -2, … from
    # the last on, or a fraction of the depth: 0.5 is block ⌊n / 2⌋ of n.
    block: int | float = -1

    def place(self, blocks: int) -> int | None:
        """Index of the block among `blocks` in use; None if there is none."""
        if isinstance(self.block, float):
            return int(self.block * blocks) if 0 <= self.block < 1 else None
        number = self.block + blocks if self.block < 0 else self.block
        return number if 0 <= number < blocks else None


QUERY = Signal("query")
NORM = Signal("norm")
FRAMES = Signal("frames")
SEEN = Signal("seen")
TOWER_KEYS = TowerSignal("keys")
TOWER_ATTENTION = TowerSignal("attention")
