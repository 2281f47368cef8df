"""Pruning by the decoder's attention (AIM, FastV, PyramidDrop, SparseVLM)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from tokencomp.plan.counts import check_ratio
from tokencomp.plan.options import effective
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import NATURAL, SCHEDULES, check_ramp
from tokencomp.reducers import Published, ScoreReducer, Tokens, Traits, register_reducer
from tokencomp.reducers.base import supplied_scores
from tokencomp.reducers.published import cut_layers
from tokencomp.tokens.signals import Attention, Signal

STEPS, TEMPERATURE = 5, 0.1  # of PageRank
OF_RAMP = effective(
    lambda self, pixels: self.schedule == "aim", "with schedule={0.schedule!r}, which has no ramp"
)


@register_reducer("prune")
@dataclass(frozen=True)
class Prune(ScoreReducer, Published):
    """Drop the visual tokens to which a decoder layer attends least.

        "pagerank":    s ← s·M five times from the uniform vector, M = softmax(logits / 0.1) the
                       causal attention of a head; root mean square over heads (AIM, 2412.03248)
        "last_query":  s = attention of the last prompt token, mean over heads (PyramidDrop,
                       2410.17247; FastV, 2403.06764)
        "rater_query": s = mean attention of the text tokens that the visual ones resemble most
                       (SparseVLM, 2410.04417)

    Deviations from the releases:

    - They mask tokens; here hidden states, rotary tables, masks and the KV cache lose them. So
      from AIM's second stage on a few kept tokens differ (Jaccard 0.97 over 100 random cases),
      because in the release masked rows still vote.
    - For ratios that a later start cannot meet there is a stage at layer 0, scored by its q and k.

    Attributes
    ----------
    score
        "pagerank", "last_query" or "rater_query".
    schedule
        "aim", "pyramid", "fastv" or "sparsevlm" (see `tokencomp.plan.schedules`).
    layer
        Whose attention: "previous", the layer before the stage (AIM, FastV), or "next", the layer
        after it, with its queries and keys of the tokens before the stage (PyramidDrop). If that
        layer has no attention (a recurrence, for example), the nearest one before it.
    start, stop
        AIM's ramp as fractions of the depth; published: 14/28 … 22/28 for video, 13/32 … 21/32 for
        images. Without effect on other schedules.
    """

    score: Literal["pagerank", "last_query", "rater_query"] = "pagerank"
    schedule: Literal["aim", "pyramid", "fastv", "sparsevlm"] = "aim"
    start: float = field(default=0.5, metadata=OF_RAMP)
    stop: float = field(default=22 / 28, metadata=OF_RAMP)
    layer: Literal["previous", "next"] = "previous"

    traits = Traits(batched=True)
    revision = 2
    summary = (
        "layerwise pruning by the decoder's own attention (AIM 2412.03248, FastV, PyramidDrop)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ramp("prune", self.start, self.stop)

    @property
    def needs(self) -> frozenset[Signal]:
        if self.score == "pagerank":
            signal = Attention("all", STEPS, TEMPERATURE, "rms")
        else:
            signal = Attention("last" if self.score == "last_query" else "raters")
        if self.layer == "next":
            signal = replace(signal, layer="next")
        return frozenset({signal})

    def plan(self, ratio: float, num_layers: int) -> Plan:
        ramp = (self.start, self.stop) if self.schedule == "aim" else ()
        profile = SCHEDULES[self.schedule](num_layers, 1.0 - check_ratio(ratio), *ramp)
        return from_profile(profile, self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        ramp = (self.start, self.stop) if self.schedule == "aim" else ()
        return cut_layers(NATURAL[self.schedule](num_layers, *ramp), self)

    def scores(self, tokens: Tokens) -> Tensor:
        return supplied_scores(tokens, "prune")


@dataclass(frozen=True)
class Preset(ScoreReducer, Published):
    """A published method that is a setting of `Prune`, under its name in plans and handles."""

    step: ClassVar[Prune]
    traits = Traits(batched=True)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.step.needs

    def plan(self, ratio: float, num_layers: int) -> Plan:
        profile = SCHEDULES[self.step.schedule](num_layers, 1.0 - check_ratio(ratio))
        return from_profile(profile, self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.step.published_layers(num_layers)

    def scores(self, tokens: Tokens) -> Tensor:
        return supplied_scores(tokens, self.name)
