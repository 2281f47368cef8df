"""Pure tensor code: which columns stay, and moving everything that has a sequence axis.

Rows of a compacted batch have different lengths; they stand right-aligned ("left-padded"), so
that the last column is the last token of every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tokencomp.tokens import Reduction, VisualSpan


@dataclass
class LiveSpan:
    """What is left of a span: `count` tokens from column `start`, at `index` of the span."""

    span: VisualSpan
    start: int
    count: int
    index: Tensor | None = None

    def to(self, device: torch.device) -> LiveSpan:
        """This span with its tensor on `device`."""
        return self if self.index is None else replace(self, index=self.index.to(device))

    @property
    def stop(self) -> int:
        """The column behind the last one."""
        return self.start + self.count

    def special_rows(self, device: torch.device) -> Tensor:
        """Which rows of what is left are special tokens or text, bool, shape (count,)."""
        special = self.span.special_mask(device)
        return special if self.index is None else special[self.index.to(device)]

    def text_rows(self) -> Tensor:
        """Rows of what is left that are text between frames, int64, ascending."""
        mask = self.span.text_mask()
        if self.index is not None:
            mask = mask[self.index.cpu()]
        return mask.nonzero()[:, 0]


@dataclass(frozen=True)
class Prompt:
    """Columns `start … stop - 1` of a row: a whole sample, or one of several packed into a row.

    Attributes
    ----------
    start, stop
        Tokens of one prompt attend to each other and to no other prompt of the row.
    trailing
        How many of the last columns are not part of the question: the answer of a training
        example, tokens generated so far, or draft tokens of assisted decoding. They never vote on
        what is kept. They stand behind every visual token.
    """

    start: int
    stop: int
    trailing: int = 0

    @property
    def question_stop(self) -> int:
        """The column behind the last token of the question."""
        return self.stop - self.trailing

    def holds(self, live: LiveSpan) -> bool:
        """Whether a live span belongs to this prompt."""
        return self.start <= live.start < self.stop


@dataclass
class RowLayout:
    """Where the tokens of one forward call stand.

    Attributes
    ----------
    width : int
        Columns; sample b occupies the last `lengths[b]` of them.
    spans
        Live spans per sample, in order.
    origin : Tensor of int64, shape (B, width), or None
        Column of the caller's batch each token came from, ascending in every row, 0 at padding.
        None while every column stands where the caller put it.
    sizes : Tensor of float32, shape (B, width), or None
        How many original tokens every column stands for; None: one each.
    prompts
        Prompts per row, in order; together they cover the real columns. Empty before a layout has
        visual tokens.
    """

    width: int
    lengths: list[int]
    spans: list[list[LiveSpan]]
    origin: Tensor | None = None
    sizes: Tensor | None = None
    prompts: list[list[Prompt]] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one prompt."""
        return any(len(row) > 1 for row in self.prompts)

    def prompt_of(self, sample: int, live: LiveSpan) -> Prompt:
        """The prompt that a live span of row `sample` belongs to."""
        return next(p for p in self.prompts[sample] if p.holds(live))

    @property
    def ragged(self) -> bool:
        return any(n != self.width for n in self.lengths)

    def to(self, device: torch.device) -> RowLayout:
        """This layout with its tensors on `device`."""
        origin, sizes = (None if t is None else t.to(device) for t in (self.origin, self.sizes))
        spans = [[live.to(device) for live in row] for row in self.spans]
        return replace(self, spans=spans, origin=origin, sizes=sizes)

    def sizes_of(self, sample: int, live: LiveSpan) -> Tensor | None:
        """Sizes of the tokens of a live span, shape (live.count,); None: one each."""
        if self.sizes is None:
            return None
        return self.sizes[sample, live.start : live.start + live.count]

    def valid(self, device: torch.device) -> Tensor | None:
        """Mask of real columns, shape (B, width); None if all are."""
        if not self.ragged:
            return None
        starts = torch.tensor([self.width - n for n in self.lengths], device=device)
        return torch.arange(self.width, device=device)[None] >= starts[:, None]


def full_layout(
    width: int,
    lengths: list[int],
    spans: list[list[VisualSpan]],
    prompts: list[list[Prompt]] | None = None,
) -> RowLayout:
    """The layout of an uncompressed, left-padded call, by default of one prompt per row."""
    live = [[LiveSpan(s, s.start, s.length) for s in row] for row in spans]
    if prompts is None:
        prompts = [[Prompt(width - n, width)] for n in lengths]
    return RowLayout(width, lengths, live, prompts=prompts)


def compact(
    layout: RowLayout, reductions: list[list[Reduction]], device: torch.device
) -> tuple[RowLayout, Tensor]:
    """The layout after `reductions`, and its index into `layout`.

    Returns
    -------
    RowLayout
    Tensor of int64, shape (B, new width)
        Column of `layout` for every new column; 0 at padding.
    """
    rows, spans = [], []
    for b, (live, reduced) in enumerate(zip(layout.spans, reductions, strict=True)):
        pieces, moved, cursor, length = [], [], layout.width - layout.lengths[b], 0
        for old, red in zip(live, reduced, strict=True):
            pieces.append(torch.arange(cursor, old.start, device=device))
            length += old.start - cursor
            keep = red.keep.to(device)
            pieces.append(keep + old.start)
            index = keep if old.index is None else old.index[keep]
            moved.append(LiveSpan(old.span, length, keep.numel(), index))
            length += keep.numel()
            cursor = old.start + old.count
        pieces.append(torch.arange(cursor, layout.width, device=device))
        rows.append(torch.cat(pieces))
        spans.append(moved)
    lengths = [r.numel() for r in rows]
    width = max(lengths)
    index = torch.stack([nn.functional.pad(r, (width - r.numel(), 0)) for r in rows])
    prompts = [
        _shrunk(layout, b, live, width - length)
        for b, (live, length) in enumerate(zip(spans, lengths, strict=True))
    ]
    for live, length in zip(spans, lengths, strict=True):
        for item in live:
            item.start += width - length
    origin = index if layout.origin is None else layout.origin.gather(1, index)
    moved_layout = RowLayout(width, lengths, spans, origin, prompts=prompts)
    moved_layout.sizes = _sizes(layout, moved_layout, index, reductions)
    return moved_layout, index


def _shrunk(layout: RowLayout, sample: int, after: list[LiveSpan], shift: int) -> list[Prompt]:
    """The prompts of a row whose spans shrank to `after`, behind `shift` columns of padding."""
    first = layout.width - layout.lengths[sample]
    pairs = list(zip(layout.spans[sample], after, strict=True))

    def place(column: int) -> int:
        removed = sum(old.count - new.count for old, new in pairs if old.start < column)
        return column - first - removed + shift

    return [Prompt(place(p.start), place(p.stop), p.trailing) for p in layout.prompts[sample]]


def _sizes(
    before: RowLayout, after: RowLayout, index: Tensor, reductions: list[list[Reduction]]
) -> Tensor | None:
    """Sizes of the columns of `after`; 1 at padding."""
    merges = any(red.sizes is not None for row in reductions for red in row)
    if before.sizes is None and not merges:
        return None
    if before.sizes is None:
        sizes = torch.ones(index.shape, device=index.device)
    else:
        valid = after.valid(index.device)
        sizes = before.sizes.gather(1, index)
        sizes = sizes if valid is None else sizes.masked_fill(~valid, 1.0)
    for b, (live, reduced) in enumerate(zip(after.spans, reductions, strict=True)):
        for item, red in zip(live, reduced, strict=True):
            if red.sizes is not None:
                sizes[b, item.start : item.start + item.count] = red.sizes.to(sizes)
    return sizes


def take(
    tensors: Sequence[Tensor], index: Tensor, dims: Sequence[int], valid: Tensor | None = None
) -> list[Tensor]:
    """Columns `index` of every tensor; one launch for all of them on a GPU.

    Parameters
    ----------
    tensors
        On one device with `index`, any dtypes. The batch axis stands before the sequence axis;
        of size 1 it is shared by all samples.
    index : Tensor of int64, shape (B, n)
    dims
        Sequence axis of each tensor, may be negative.
    valid : Tensor of bool, shape (B, n), or None
        False at padding, which becomes 0: copies of other tokens there could carry NaN along.
    """
    from tokencomp.kernels import gather_rows

    if valid is not None:
        index = index.masked_fill(~valid, -1)
    return gather_rows(tensors, index, dims, [dim - 1 for dim in dims])


def write_merged(x: Tensor, layout: RowLayout, reductions: list[list[Reduction]]) -> Tensor:
    """Put merged features at the columns of their kept tokens (in place on the gathered x)."""
    for b, (live, reduced) in enumerate(zip(layout.spans, reductions, strict=True)):
        for item, red in zip(live, reduced, strict=True):
            if red.merged is not None:
                x[b, item.start : item.start + item.count] = red.merged.to(x)
    return x
