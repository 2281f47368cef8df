"""Comparator: pruning in stages."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers.prune import Preset, Prune
from tokencomp.reducers.registry import register_reducer


@register_reducer("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Preset):
    """Preset of PyramidDrop (arXiv 2410.17247): cuts at a quarter, half and three quarters.

    Every cut keeps the same share (half, or more if the ratio allows), by the attention of the last
    prompt token, mean over heads, in the layer after the cut: its own queries and keys of the
    tokens before the cut, as in the authors' code. If three halvings cannot meet the ratio, there
    is one more cut at the start (ours).

    The authors' code differs in two ways. It renumbers positions from 0 after every cut, and here
    tokens keep theirs, so that from the second cut on scores and kept tokens differ. It rounds
    counts down, and here half a token is rounded up.
    """

    revision = 2  # 1: attention of the layer before the cut
    summary = "equal cuts at 1/4, 1/2, 3/4 of the depth (PyramidDrop 2410.17247)"
    step = Prune(score="last_query", schedule="pyramid", layer="next")
