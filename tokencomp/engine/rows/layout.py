"""Pure tensor code: which columns stay, and moving everything that has a sequence axis.

Rows of a compacted batch have different lengths; they stand right-aligned ("left-padded"), so
that the last column is the last token of every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.rows.host_tables import HostTables
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import VisualSpan


@dataclass
class LiveSpan:
    """What is left of a span: `count` tokens from column `start`."""

    span: VisualSpan
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The column behind the last one."""
        return self.start + self.count

    @property
    def whole(self) -> bool:
        """Whether no token of the span has left."""
        return self.count == self.span.length


@dataclass
class Selection:
    """Which of the live visual tokens of a call stay.

    Attributes
    ----------
    counts
        Per sample, per span: tokens that stay.
    chosen
        (sample, span) of the spans that lose tokens but not all of them, in order.
    reduction
        What stays of those, as rows of all of them one after the other; None if there are none.
    """

    counts: list[list[int]]
    chosen: list[tuple[int, int]]
    reduction: Reduction | None


@dataclass(frozen=True)
class PromptColumns:
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
    raters : Tensor of float32, shape (B, width), or None
        Weight of every column among the raters of its prompt, 0 for all others; None where no
        stage asks for them.
    """

    width: int
    lengths: list[int]
    spans: list[list[LiveSpan]]
    origin: Tensor | None = None
    sizes: Tensor | None = None
    prompts: list[list[PromptColumns]] = field(default_factory=list)
    raters: Tensor | None = None
    _valid: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def kinds(self) -> set[str]:
        """Kinds of media among the live spans."""
        return {live.span.kind for row in self.spans for live in row}

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one prompt."""
        return any(len(row) > 1 for row in self.prompts)

    def prompt_of(self, sample: int, live: LiveSpan) -> PromptColumns:
        """The prompt that a live span of row `sample` belongs to."""
        return next(p for p in self.prompts[sample] if p.holds(live))

    def spans_of(self, sample: int, prompt: PromptColumns) -> list[LiveSpan]:
        """The live spans of a prompt of row `sample`, in order."""
        return [live for live in self.spans[sample] if prompt.holds(live)]

    def question_text(self, sample: int, prompt: PromptColumns) -> slice:
        """Columns of the question behind the last span of a prompt; all of it without spans."""
        first = max((live.stop for live in self.spans_of(sample, prompt)), default=prompt.start)
        return slice(first, prompt.question_stop)

    def ends_question(self, sample: int, live: LiveSpan) -> bool:
        """Whether a question ends in a span, so that its last column predicts the next token."""
        return live.stop == self.prompt_of(sample, live).question_stop

    @property
    def ragged(self) -> bool:
        return any(n != self.width for n in self.lengths)

    def to(self, device: torch.device) -> RowLayout:
        """This layout with its tensors on `device`."""
        tensors = self.origin, self.sizes, self.raters
        origin, sizes, raters = (None if t is None else t.to(device) for t in tensors)
        return replace(self, origin=origin, sizes=sizes, raters=raters)

    def index_of(self, sample: int, live: LiveSpan) -> Tensor | None:
        """Offsets in its span of what is left of it, int64, shape (count,); None: all of them."""
        if live.whole or self.origin is None:
            return None
        return self.origin[sample, live.start : live.stop] - live.span.start

    def valid(self, device: torch.device) -> Tensor | None:
        """Mask of real columns, shape (B, width); None if all are."""
        if not self.ragged:
            return None
        if self._valid is None or self._valid.device != device:
            starts = self.width - np.asarray(self.lengths)
            mask = np.arange(self.width)[None] >= starts[:, None]
            self._valid = torch.from_numpy(mask).to(device)
        return self._valid


def full_layout(
    width: int,
    lengths: list[int],
    spans: list[list[VisualSpan]],
    prompts: list[list[PromptColumns]] | None = None,
) -> RowLayout:
    """The layout of an uncompressed, left-padded call, by default of one prompt per row."""
    live = [[LiveSpan(s, s.start, s.length) for s in row] for row in spans]
    if prompts is None:
        prompts = [[PromptColumns(width - n, width)] for n in lengths]
    return RowLayout(width, lengths, live, prompts=prompts)


def compact(
    layout: RowLayout, selection: Selection, device: torch.device
) -> tuple[RowLayout, Tensor, Tensor | None]:
    """The layout after a stage, and its index into `layout`.

    Which columns text and whole spans come from is known on the host. One table holds them, the
    columns of the tokens that may leave, and the places of those that stay; it moves to the device
    once, where the kept rows are filled in.

    Returns
    -------
    RowLayout
    Tensor of int64, shape (B, new width)
        Column of `layout` for every new column; 0 at padding.
    Tensor of int64, or None
        Flat places (sample · new width + column) of the rows of `selection.reduction`.
    """
    pairs = list(zip(layout.spans, selection.counts, strict=True))
    lengths = [
        n - sum(old.count for old in live) + sum(counts)
        for n, (live, counts) in zip(layout.lengths, pairs, strict=True)
    ]
    width, chosen = max(lengths), set(selection.chosen)
    table = np.zeros((len(lengths), width), dtype=np.int64)
    spans, columns, places = [], [], []
    for b, (live, counts) in enumerate(pairs):
        at, cursor, moved = width - lengths[b], layout.width - layout.lengths[b], []
        for j, (old, count) in enumerate(zip(live, counts, strict=True)):
            text = old.start - cursor
            table[b, at : at + text] = np.arange(cursor, old.start)
            at += text
            moved.append(LiveSpan(old.span, at, count))
            if (b, j) in chosen:
                columns.append(np.arange(old.start, old.stop))
                places.append(np.arange(at, at + count) + b * width)
            else:
                table[b, at : at + count] = np.arange(old.start, old.start + count)
            at, cursor = at + count, old.stop
        table[b, at:] = np.arange(cursor, layout.width)
        spans.append(moved)
    prompts = [_shrunk(layout, b, moved, width - lengths[b]) for b, moved in enumerate(spans)]
    host, place = HostTables(device), None
    flat, reduction = host.add(table.ravel()), selection.reduction
    if reduction is not None:
        places_of, columns_of = host.add(np.concatenate(places)), host.add(np.concatenate(columns))
    host.move()
    if reduction is not None:
        place, kept = places_of(), reduction.keep.to(device)
        flat().index_copy_(0, place, columns_of().index_select(0, kept))
    index = flat().view(table.shape)
    origin = index if layout.origin is None else layout.origin.gather(1, index)
    after = RowLayout(width, lengths, spans, origin, prompts=prompts)
    after.sizes = _sizes(layout, after, index, reduction, place)
    after.raters = None if layout.raters is None else layout.raters.gather(1, index)
    return after, index, place


def _shrunk(
    layout: RowLayout, sample: int, after: list[LiveSpan], shift: int
) -> list[PromptColumns]:
    """The prompts of a row whose spans shrank to `after`, behind `shift` columns of padding."""
    first = layout.width - layout.lengths[sample]
    pairs = list(zip(layout.spans[sample], after, strict=True))

    def place(column: int) -> int:
        removed = sum(old.count - new.count for old, new in pairs if old.start < column)
        return column - first - removed + shift

    return [
        PromptColumns(place(p.start), place(p.stop), p.trailing) for p in layout.prompts[sample]
    ]


def _sizes(
    before: RowLayout,
    after: RowLayout,
    index: Tensor,
    reduction: Reduction | None,
    place: Tensor | None,
) -> Tensor | None:
    """Sizes of the columns of `after`; 1 at padding."""
    merged = None if reduction is None else reduction.sizes
    if before.sizes is None and merged is None:
        return None
    if before.sizes is None:
        sizes = torch.ones(index.shape, device=index.device)
    else:
        valid = after.valid(index.device)
        sizes = before.sizes.gather(1, index)
        sizes = sizes if valid is None else sizes.masked_fill(~valid, 1.0)
    if merged is not None and place is not None:
        sizes.view(-1).index_copy_(0, place, merged.to(sizes))
    return sizes


def kept_values(values: Tensor, before: RowLayout, after: RowLayout, index: Tensor) -> Tensor:
    """What is left of one value per visual token, (tokens,), when those of `after` stay.

    Parameters
    ----------
    index : Tensor of int64, shape (B, width of `after`)
        Column of `before` for every column of `after`.
    """
    table = values.new_zeros(index.shape[0] * before.width)
    table[visual_places(before, values.device)] = values
    left = table.view(-1, before.width).gather(1, index).flatten()
    return left[visual_places(after, values.device)]


def visual_places(layout: RowLayout, device: torch.device) -> Tensor:
    """Flat places (sample · width + column) of all visual tokens that are left, in order."""
    places = [
        np.arange(live.start, live.stop) + b * layout.width
        for b, row in enumerate(layout.spans)
        for live in row
    ]
    return torch.from_numpy(np.concatenate(places)).to(device)


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
    from tokencomp.kernels.dispatch import checked

    if valid is not None:
        index = index.masked_fill(~valid, -1)
    # Complex rotary tables (Llama 4) are moved as pairs of real numbers.
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    dims = [d % t.ndim for d, t in zip(dims, tensors, strict=True)]
    with checked():  # the index comes from a layout, so the host need not wait to look at it
        rows: list[Tensor] = gather_rows(real, index, dims, [dim - 1 for dim in dims])
    return [
        torch.view_as_complex(row) if t.is_complex() else row
        for row, t in zip(rows, tensors, strict=True)
    ]


def write_merged(x: Tensor, place: Tensor | None, reduction: Reduction | None) -> None:
    """Put merged features at the places of their kept tokens (in place on the gathered x)."""
    if reduction is not None and reduction.merged is not None and place is not None:
        x.flatten(0, 1).index_copy_(0, place, reduction.merged.to(x))
