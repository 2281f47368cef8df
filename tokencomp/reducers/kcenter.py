"""Greedy k-center: the default in the vision tower. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._pixels import OF_PIXELS, descriptor
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens
from tokencomp.validation import check_range


@register_reducer("kcenter")
@dataclass(frozen=True)
class KCenter(Reducer):
    r"""Greedy k-center by the root mean square of differences (Gonzalez 1985; use here ours).

    .. math:: next = \arg\max_i \min_{j \in kept} \|x_i - x_j\| / \sqrt d

    The first token is the one farthest from the mean, and every next one the farthest from all
    chosen so far. What is everywhere alike, such as a background, therefore needs few tokens. The
    distance keeps brightness, which a cosine on pixels would lose. Exact copies of a chosen token
    come last: while the budget exceeds the number of different cells, a document or screen loses
    only copies (the regime of PixelPrune, arXiv 2604.00886), with `pool=1` to the pixel.

    In the vision tower before its first block, cells are compared by averages of pixels, by the
    contrast that averages hide, and by what changes within a cell. Letters are strokes of few
    pixels: averaged, a word looks like the plain surface around it, and large areas of colour win.
    Things that blink look the same each time, so that one time would stand for all.

    What that means for photographs follows from the distance. Where all parts of a picture have
    about the same contrast, such as grain or noise of the sensor, it adds nothing. Where sharp and
    smooth parts alternate, sharp ones differ more from each other and get more of the budget. With
    a camera that moves, all cells change, and what looks alike in several steps stays more often.

    Attributes
    ----------
    pool : int
        In the vision tower before its first block, pixels are averaged over squares of this side
        inside of every patch before they are compared: 4 takes a sixteenth of the work, and is
        robust to shifts by a pixel and to noise of codecs. 1 compares all pixels. Elsewhere
        features are compared as they are.
    std_weight : float
        How much the standard deviation of the pixels in such a square counts relative to their
        average; 0: not at all. With 1, and normally distributed pixels, the distance is that of
        two distributions (Wasserstein-2). A square of one pixel has no contrast.
    temporal_weight : float
        In towers that read several frames into one cell (the Qwen families): how much the change
        from frame to frame of a cell sets it apart from cells that look and change alike in other
        steps of the video; 0: not at all. See `tokencomp.reducers._pixels.descriptor`.
    """

    pool: int = field(default=4, metadata=OF_PIXELS)
    std_weight: float = field(default=1.0, metadata=OF_PIXELS)
    temporal_weight: float = field(default=1.0, metadata=OF_PIXELS)

    traits = Traits(batched=True)
    summary = "greedy k-center by appearance (Gonzalez 1985), default in the vision tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "pool", self.pool, 1, 64)
        check_range(self.name, "std_weight", self.std_weight, 0, 16)
        check_range(self.name, "temporal_weight", self.temporal_weight, 0, 16)

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x = descriptor(tokens, self.pool, self.std_weight, self.temporal_weight)
        return Kept(maxmin_select(x, tokens.budgets, spans=tokens.lengths, metric="rms"))
