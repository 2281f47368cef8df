"""Comparator: pruning once, early."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers.prune import Preset, Prune
from tokencomp.reducers.registry import register_reducer


@register_reducer("fastv")
@dataclass(frozen=True)
class FastV(Preset):
    """Preset of FastV (arXiv 2403.06764): one cut after layer 2, by the last token's attention.

    The fraction that is cut follows from the ratio. If a cut after layer 2 cannot meet the ratio,
    the cut comes earlier (ours).
    """

    summary = "one early cut by the last token's attention (FastV 2403.06764)"
    step = Prune(score="last_query", schedule="fastv")
