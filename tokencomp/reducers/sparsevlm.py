"""Comparator: pruning by the text tokens that matter."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers.prune import Preset, Prune
from tokencomp.reducers.registry import register_reducer


@register_reducer("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Preset):
    """Preset of SparseVLM's second version (arXiv 2410.04417): three cuts by raters' attention.

    Raters are the text tokens after the last span that the visual tokens resemble most, by raw
    products of input embeddings. Tokens stay by the raters' attention, mean over heads and raters,
    in the layer before each cut. The cuts come behind layers 2, 6 and 15 of 32, scaled to the
    depth, and leave 300, 200 and 118 of 576 tokens; the same shape is scaled for other ratios
    (ours).

    Notes
    -----
    Kept tokens keep their positions and dropped ones are gone, as in the release's version 2;
    version 1 merges some of the dropped ones into new tokens and renumbers all. Two parts of
    version 2 are not here: it divides attention by a product of rotated ones, and counts only the
    14 heads that look at the picture most. The paper's count by the rank of the attention is a
    fixed list in the release, too.
    """

    summary = "three cuts by the attention of chosen text tokens (SparseVLM 2410.04417)"
    step = Prune(score="rater_query", schedule="sparsevlm")
