"""Comparator: pruning once, early."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.plan import Plan
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.reducers.prune import Prune


@register_reducer("fastv")
@dataclass(frozen=True)
class FastV(Reducer):
    """Preset of FastV (arXiv 2403.06764): one cut after layer 2, by the last token's attention.

    The fraction cut is solved for the ratio. Ratios that a cut after layer 2 cannot meet move it
    earlier (ours).
    """

    summary = "one early cut by the last token's attention (FastV 2403.06764)"

    def plan(self, ratio: float, num_layers: int) -> Plan:
        return Prune(score="last_query", schedule="fastv").plan(ratio, num_layers)
