"""Layerwise pruning by the decoder's own attention (AIM stage B, FastV, PyramidDrop)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.reducer import Traits, effective
from tokencomp.plan.schedules import NATURAL, SCHEDULES, aim, check_ramp, natural_aim
from tokencomp.reducers._batch import supplied_scores
from tokencomp.reducers.base import ScoreReducer
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.tokens.tokens import Tokens

STEPS, TEMPERATURE = 5, 0.1  # of PageRank
OF_RAMP = effective(
    lambda self, pixels: self.schedule == "aim", "with schedule={0.schedule!r}, which has no ramp"
)


@register_reducer("prune")
@dataclass(frozen=True)
class Prune(ScoreReducer, Published):
    """Drop the visual tokens that a layer beside the stage attends to least.

    Attributes
    ----------
    score
        "pagerank": five steps s ← s·M of the layer's causal attention M = softmax(logits / 0.1)
        from the uniform vector, per head, root mean square over heads (AIM, arXiv 2412.03248).
        "last_query": attention of the last prompt token, mean over heads (PyramidDrop,
        arXiv 2410.17247; FastV, arXiv 2403.06764). "rater_query": mean over the text tokens that
        the visual ones resemble most (SparseVLM, arXiv 2410.04417).
    schedule
        "aim", "pyramid", "fastv" or "sparsevlm" (see `tokencomp.plan.schedules`).
    layer
        Whose attention: "previous", the layer before the stage (AIM, FastV), or "next", the layer
        after it, by its own queries and keys of the tokens before the stage (PyramidDrop). Where
        that layer has no attention (a recurrence, for example), the nearest one before it counts.
    start, stop
        AIM's ramp as fractions of the depth; published: 14/28 … 22/28 for video, 13/32 … 21/32 for
        images. Without effect on other schedules.

    Notes
    -----
    The authors mask tokens; in this package the tokens leave hidden states, rotary tables, masks
    and the KV cache. A stage at layer 0 (for ratios that a later start cannot meet) is scored by
    layer 0's q and k.

    Against AIM's release the first stage keeps the same tokens. From the second stage on a few
    differ (Jaccard 0.97 over 100 random cases), because there masked rows still vote.
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
        target = 1.0 - check_ratio(ratio)
        if self.schedule == "aim":
            profile = aim(num_layers, target, self.start, self.stop)
        else:
            profile = SCHEDULES[self.schedule](num_layers, target)
        return from_profile(profile, self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.schedule == "aim":
            natural = natural_aim(num_layers, self.start, self.stop)
        else:
            natural = NATURAL[self.schedule](num_layers)
        return tuple(stage.layer for stage in from_profile(natural, self).stages)

    def scores(self, tokens: Tokens) -> Tensor:
        return supplied_scores(tokens, "prune")


@dataclass(frozen=True)
class Preset(Published):
    """The steps that a published method takes, as a setting of `Prune`."""

    step: ClassVar[Prune]

    def plan(self, ratio: float, num_layers: int) -> Plan:
        return self.step.plan(ratio, num_layers)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.step.published_layers(num_layers)
