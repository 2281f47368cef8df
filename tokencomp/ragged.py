"""Pure tensor code: which columns stay, and moving everything that has a sequence axis.

Rows of a compacted batch have different lengths; they stand right-aligned ("left-padded"), so
that the last column is the last token of every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.context import Reduction, VisualSpan


@dataclass
class LiveSpan:
    """What is left of a span: `count` tokens from column `start`, at `index` of the span."""

    span: VisualSpan
    start: int
    count: int
    index: Tensor | None = None

    def text_rows(self) -> Tensor:
        """Rows of what is left that are text between frames, int64, ascending."""
        mask = self.span.text_mask()
        if self.index is not None:
            mask = mask[self.index.cpu()]
        return mask.nonzero()[:, 0]


@dataclass
class Frame:
    """Where the tokens of one forward call stand.

    Attributes
    ----------
    width : int
        Columns; sample b occupies the last `lengths[b]` of them.
    spans
        Live spans per sample, in order.
    origin : Tensor of int64, shape (B, width), or None
        Column of the uncompressed call each token came from. None for the uncompressed frame.
    """

    width: int
    lengths: list[int]
    spans: list[list[LiveSpan]]
    origin: Tensor | None = None

    @property
    def ragged(self) -> bool:
        return any(n != self.width for n in self.lengths)

    def valid(self, device: torch.device) -> Tensor | None:
        """Mask of real columns, shape (B, width); None if all are."""
        if not self.ragged:
            return None
        starts = torch.tensor([self.width - n for n in self.lengths], device=device)
        return torch.arange(self.width, device=device)[None] >= starts[:, None]


def full_frame(width: int, lengths: list[int], spans: list[list[VisualSpan]]) -> Frame:
    """The frame of an uncompressed call."""
    live = [[LiveSpan(s, s.start, s.length) for s in row] for row in spans]
    return Frame(width, lengths, live)


def compact(
    frame: Frame, reductions: list[list[Reduction]], device: torch.device
) -> tuple[Frame, Tensor]:
    """The frame after `reductions`, and its index into `frame`.

    Returns
    -------
    Frame
    Tensor of int64, shape (B, new width)
        Column of `frame` for every new column; 0 at padding.
    """
    rows, spans = [], []
    for b, (live, reduced) in enumerate(zip(frame.spans, reductions, strict=True)):
        pieces, moved, cursor, length = [], [], frame.width - frame.lengths[b], 0
        for old, red in zip(live, reduced, strict=True):
            pieces.append(torch.arange(cursor, old.start, device=device))
            length += old.start - cursor
            keep = red.keep.to(device)
            pieces.append(keep + old.start)
            index = keep if old.index is None else old.index[keep]
            moved.append(LiveSpan(old.span, length, keep.numel(), index))
            length += keep.numel()
            cursor = old.start + old.count
        pieces.append(torch.arange(cursor, frame.width, device=device))
        rows.append(torch.cat(pieces))
        spans.append(moved)
    lengths = [r.numel() for r in rows]
    width = max(lengths)
    index = torch.stack([torch.nn.functional.pad(r, (width - r.numel(), 0)) for r in rows])
    for moved, length in zip(spans, lengths, strict=True):
        for item in moved:
            item.start += width - length
    origin = index if frame.origin is None else frame.origin.gather(1, index)
    return Frame(width, lengths, spans, origin), index


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather columns `index` (B, n) along sequence axis `dim` of x; the batch axis is `dim - 1`.

    A batch axis of 1 is broadcast to B.
    """
    index = index.to(x.device)
    if index.shape[0] == 1 and x.shape[dim - 1] == 1:
        return x.index_select(dim, index[0])
    shape = list(x.shape)
    shape[dim - 1] = index.shape[0]
    x = x.expand(shape)
    view = [1] * x.ndim
    view[dim - 1], view[dim] = index.shape
    shape[dim] = index.shape[1]
    return x.gather(dim, index.view(view).expand(shape))


def write_merged(x: Tensor, frame: Frame, reductions: list[list[Reduction]]) -> Tensor:
    """Put merged features at the columns of their kept tokens (in place on the gathered x)."""
    for b, (live, reduced) in enumerate(zip(frame.spans, reductions, strict=True)):
        for item, red in zip(live, reduced, strict=True):
            if red.merged is not None:
                x[b, item.start : item.start + item.count] = red.merged.to(x)
    return x


def restore(x: Tensor, frame: Frame, width: int) -> Tensor:
    """Scatter rows of x (B, frame.width, d) back to `width` columns, zeros where nothing is."""
    if frame.origin is None:
        return x
    out = x.new_zeros(x.shape[0], width, x.shape[2])
    for b, length in enumerate(frame.lengths):
        start = frame.width - length
        out[b, frame.origin[b, start:].to(x.device)] = x[b, start:]
    return out
