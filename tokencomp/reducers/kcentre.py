"""Greedy k-centre: the default in the vision tower. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokencomp.reducers._batch import Patches
from tokencomp.reducers._pixels import appearance
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.reduction import Reduction
from tokencomp.tokens import SpanBatch
from tokencomp.validation import check_range


@register_reducer("kcentre")
@dataclass(frozen=True)
class KCentre(Reducer):
    """Greedy k-centre by the root mean square of differences (Gonzalez 1985; use here ours).

    The first token is the one farthest from the mean, and every next one the farthest from all
    chosen so far. What is everywhere alike, such as a background, therefore needs few tokens. The
    distance keeps brightness, which a cosine on pixels would lose. Exact copies of a chosen token
    come last: while the budget exceeds the number of different cells, a document or screen loses
    only copies (the regime of PixelPrune, arXiv 2604.00886), with `thumb=1` to the pixel.

    Attributes
    ----------
    thumb : int
        In the vision tower before its first block, pixels are averaged over squares of this side
        inside of every patch before they are compared: 4 takes a sixteenth of the work, and is
        robust to shifts by a pixel and to noise of codecs. 1 compares all pixels. Elsewhere
        features are compared as they are.
    """

    thumb: int = 4

    summary = "greedy k-centre by appearance (Gonzalez 1985), default in the vision tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "thumb", self.thumb, 1, 64)

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import maxmin_select

        patches = Patches.of(batch, keeps)
        x = appearance(patches.features, batch.pixels, self.thumb)
        return patches.kept(maxmin_select(x, patches.budgets, spans=patches.lengths, metric="rms"))
