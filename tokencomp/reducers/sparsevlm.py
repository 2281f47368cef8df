"""SparseVLM: pruning by the attention of selected text tokens (arXiv 2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers import register_reducer
from tokencomp.reducers.prune import Preset, Prune


@register_reducer("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Preset):
    """Preset of SparseVLM, version 2 (arXiv 2410.04417): three cuts by the attention of raters.

        raters: text tokens after the last span that visual tokens resemble most, by the products
                of input embeddings
        s_i   = mean over heads and raters of the attention to token i, in the layer before the cut

    Cuts after layers 2, 6 and 15 of 32, scaled to the depth, keep 300, 200 and 118 of 576 tokens;
    the same shape is scaled for other ratios (ours). The paper derives the counts from the rank of
    the attention, the release has this fixed list.

    Deviations from the release's version 2:

    - It divides attention by a product of rotated ones; here it does not.
    - It counts only the 14 heads that attend to the image most; here all heads count.

    Kept tokens keep their positions, as there; version 1 merges dropped tokens into new ones and
    renumbers all.
    """

    summary = "three cuts by the attention of chosen text tokens (SparseVLM 2410.04417)"
    step = Prune(score="rater_query", schedule="sparsevlm")
