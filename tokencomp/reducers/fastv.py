"""FastV: one early cut by attention (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers import register_reducer
from tokencomp.reducers.prune import Preset, Prune


@register_reducer("fastv")
@dataclass(frozen=True)
class FastV(Preset):
    """Preset of FastV (arXiv 2403.06764): one cut after layer 2, by the last token's attention.

        s_i = mean over heads of the attention of the last prompt token to token i,
              in the layer before the cut

    The fraction that is cut follows from the ratio. If a cut after layer 2 cannot meet it, the cut
    comes earlier (ours).
    """

    summary = "one early cut by the last token's attention (FastV 2403.06764)"
    step = Prune(score="last_query", schedule="fastv")
