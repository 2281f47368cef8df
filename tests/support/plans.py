"""Plans of the exactness suite: entry stages, layer stages, both, and whole spans that leave."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from support.families import Family
from tokencomp import Kept, Plan, Reducer, Stage, Tokens, make_reducer
from tokencomp.reducers import ScoreReducer
from tokencomp.reducers.base import supplied_scores, tower_signal
from tokencomp.tokens.signals import TOWER_ATTENTION, Attention

RELEVANT = make_reducer("condiv", power=1.0)
"""Scores tokens at entry by attention, on images too."""


@dataclass(frozen=True)
class TowerTop(ScoreReducer):
    """Keeps the tokens that the vision tower's last block attends to most."""

    needs = frozenset({TOWER_ATTENTION})

    def scores(self, tokens: Tokens) -> Tensor:
        return tower_signal(tokens, TOWER_ATTENTION, "tower top")


@dataclass(frozen=True)
class TextTop(ScoreReducer):
    """Keeps the tokens that the text after their span attends to most."""

    needs = frozenset({Attention("text")})

    def scores(self, tokens: Tokens) -> Tensor:
        return supplied_scores(tokens, "text top")


@dataclass(frozen=True)
class Ragged(Reducer):
    """Keeps leading tokens; the only reducer here whose choice is trivially predictable."""

    def reduce(self, tokens: Tokens) -> Kept:
        return Kept(torch.arange(tokens.budgets[0], device=tokens.device))


def make(name: str, layers: int) -> Plan:
    uniform, last = make_reducer("uniform"), make_reducer("prune", score="last_query")
    plans = {
        "entry": Plan((Stage(0, 0.4, uniform),)),
        "layer": Plan((Stage(2, 0.5, uniform),)),
        "both": Plan((Stage(0, 0.7, make_reducer("random")), Stage(1, 0.5, Ragged()))),
        "attention": Plan((Stage(1, 0.6, last), Stage(3, 0.3, last))),
        "vanish": Plan((Stage(0, 0.8, uniform), Stage(1, 0.5, uniform), Stage(3, 0.0, uniform))),
        "pagerank": make_reducer("prune").plan(0.6, layers),
        "merged": Plan((Stage(0, 0.4, make_reducer("kcenter"), merge=True),)),
    }
    return plans[name]


NAMES = ("entry", "layer", "both", "attention", "vanish", "pagerank")
DISTINCT = NAMES[:-1]  # caches see no difference between two ways to score
QUESTION_FREE = ("entry", "layer", "both", "vanish")
MERGED = "merged"  # its oracle is another one, see `oracle.Merged`


SCORED = ("attention", "pagerank")
UNSCORED = {
    **dict.fromkeys(("lfm2_vl", "minicpmv4_6", "qwen3_5"), "its first layer has no attention"),
    "inkling_mm_model": "its attention has a bias that scores do not know",
}


def skip_refused(family: Family, name: str) -> None:
    """Skip the plans that a family refuses; that it does is tested in test_layer_types.py."""
    stages = [stage.layer for stage in make(name, family.layers).layer_stages]
    if name == MERGED and family.name == "inkling_mm_model":
        pytest.skip("a bias by distance leaves no room for weights")
    if name in SCORED and family.name in UNSCORED:
        pytest.skip(UNSCORED[family.name])
    if family.name == "gemma4_e" and max(stages, default=0) > 1:
        pytest.skip("its last layers read the keys of layer 1")
