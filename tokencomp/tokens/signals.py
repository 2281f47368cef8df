"""Signals: what the engine computes for the reducers that need more than features and grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
