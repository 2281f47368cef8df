"""PyramidDrop: equal cuts at three depths (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers import register_reducer
from tokencomp.reducers.prune import Preset, Prune


@register_reducer("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Preset):
    """Preset of PyramidDrop (arXiv 2410.17247): cuts at a quarter, half and three quarters.

        s_i = mean over heads of the attention of the last prompt token to token i,
              in the layer after the cut, with its queries and keys of the tokens before the cut

    Every cut keeps the same share of largest s: a half, or more if the ratio allows.

    Deviations from the authors' code:

    - If three halvings cannot meet the ratio, there is one more cut at the start (ours).
    - Tokens keep their positions. The code renumbers them after every cut, so that from the second
      cut on scores and kept tokens differ.
    - Half a token is rounded up; the code rounds down.
    """

    revision = 2  # 1: attention of the layer before the cut
    summary = "equal cuts at 1/4, 1/2, 3/4 of the depth (PyramidDrop 2410.17247)"
    step = Prune(score="last_query", schedule="pyramid", layer="next")
