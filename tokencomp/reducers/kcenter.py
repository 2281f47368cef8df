"""Greedy k-center by appearance (Gonzalez 1985): the default in the vision tower (ours)."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers._pixels import OF_PIXELS, descriptor
from tokencomp.validation import between


@register_reducer("kcenter")
@dataclass(frozen=True)
class KCenter(Reducer):
    """Greedy k-center by the root mean square of differences (Gonzalez 1985; use here ours).

        next = argmax_i  min over kept j of ‖x_i - x_j‖ / √d

    The first token is the one farthest from the mean. Uniform areas, such as a background, need few
    tokens. The distance keeps brightness, which a cosine of pixels would lose. Exact copies of a
    kept token come last: while the budget exceeds the number of different cells, a document or
    screen loses only copies (the regime of PixelPrune, arXiv 2604.00886), with `pool=1` to the
    pixel.

    Before the first block of the vision tower, x are averages of pixels, their standard deviations,
    and the temporal change within a cell (see `tokencomp.reducers._pixels.descriptor`). By averages
    alone, a word looks like the surface around it, and one phase of a blinking light represents
    all. On photographs, sharp areas get a larger share of the budget than smooth ones; under a
    moving camera all cells change, so similar cells of several steps are kept more often.

    Attributes
    ----------
    pool : int
        Side of the squares over which pixels are averaged inside each patch: 4 takes a sixteenth of
        the work and is robust to shifts by a pixel and to codec noise; 1 compares all pixels.
    std_weight : float
        Weight of the standard deviation of the pixels in a square, relative to their average; 0:
        not used. With 1 and normally distributed pixels the distance is Wasserstein-2.
    temporal_weight : float
        In towers that read several frames into one cell (the Qwen families): weight of the change
        between these frames; 0: not used.
    """

    pool: int = field(default=4, metadata=OF_PIXELS | between(1, 64))
    std_weight: float = field(default=1.0, metadata=OF_PIXELS | between(0, 16))
    temporal_weight: float = field(default=1.0, metadata=OF_PIXELS | between(0, 16))

    traits = Traits(batched=True)
    summary = "greedy k-center by appearance (Gonzalez 1985), default in the vision tower"

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x = descriptor(tokens, self.pool, self.std_weight, self.temporal_weight)
        return Kept(maxmin_select(x, tokens.budgets, spans=tokens.lengths, metric="rms"))
