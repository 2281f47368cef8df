"""Where the tokens of a call stand: spans, prompts and padding of every row; values by columns.

Rows of a compacted batch have different lengths; they stand right-aligned ("left-padded"), so
that the last column is the last token of every sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokencomp.tokens.spans import VisualSpan


@dataclass(frozen=True)
class KeptSpan:
    """What is left of a span: `count` tokens from column `start`."""

    span: VisualSpan
    start: int
    count: int

    @cached_property
    def stop(self) -> int:
        """The column behind the last one."""
        return self.start + self.count

    @cached_property
    def whole(self) -> bool:
        """Whether no token of the span has left."""
        return self.count == self.span.length


@dataclass(frozen=True)
class PromptColumns:
    """Columns `start … stop - 1` of a row: a whole sample, or one of several packed into a row.

    Attributes
    ----------
    start, stop
        Tokens of one prompt attend to each other and to no other prompt of the row.
    question_stop
        The column behind the last token of the question. What follows is the answer of a training
        example, tokens generated so far, or draft tokens of assisted decoding. They never vote on
        what is kept. They stand behind every visual token.
    """

    start: int
    stop: int
    question_stop: int

    def holds(self, live: KeptSpan) -> bool:
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
    spans: list[list[KeptSpan]]
    origin: Tensor | None = None
    sizes: Tensor | None = None
    prompts: list[list[PromptColumns]] = field(default_factory=list)
    raters: Tensor | None = None
    _valid: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def modalities(self) -> set[str]:
        """Kinds of media among the live spans."""
        return {live.span.modality for row in self.spans for live in row}

    @cached_property
    def packed(self) -> bool:
        """Whether a row holds more than one prompt."""
        return any(len(row) > 1 for row in self.prompts)

    def prompt_of(self, sample: int, live: KeptSpan) -> PromptColumns:
        """The prompt that a live span of row `sample` belongs to."""
        return next(p for p in self.prompts[sample] if p.holds(live))

    def spans_of(self, sample: int, prompt: PromptColumns) -> list[KeptSpan]:
        """The live spans of a prompt of row `sample`, in order."""
        return [live for live in self.spans[sample] if prompt.holds(live)]

    def question_text(self, sample: int, prompt: PromptColumns) -> slice:
        """Columns of the question behind the last span of a prompt; all of it without spans."""
        first = max((live.stop for live in self.spans_of(sample, prompt)), default=prompt.start)
        return slice(first, prompt.question_stop)

    def ends_question(self, sample: int, live: KeptSpan) -> bool:
        """Whether a question ends in a span, so that its last column predicts the next token."""
        return live.stop == self.prompt_of(sample, live).question_stop

    def to(self, device: torch.device) -> RowLayout:
        """This layout with its tensors on `device`."""
        tensors = self.origin, self.sizes, self.raters
        origin, sizes, raters = (None if t is None else t.to(device) for t in tensors)
        return replace(self, origin=origin, sizes=sizes, raters=raters)

    def index_of(self, sample: int, live: KeptSpan) -> Tensor | None:
        """Offsets in its span of what is left of it, int64, shape (count,); None: all of them."""
        if live.whole or self.origin is None:
            return None
        return self.origin[sample, live.start : live.stop] - live.span.start

    def valid(self, device: torch.device) -> Tensor | None:
        """Mask of real columns, shape (B, width); None if all are."""
        if all(n == self.width for n in self.lengths):
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
    live = [[KeptSpan(s, s.start, s.length) for s in row] for row in spans]
    if prompts is None:
        prompts = [[PromptColumns(width - n, width, width)] for n in lengths]
    return RowLayout(width, lengths, live, prompts=prompts)


def visual_values(values: Tensor, layout: RowLayout) -> Tensor:
    """One value per column, (B, width), as one per visual token that is left, (tokens,)."""
    return values.flatten().index_select(0, visual_places(layout, values.device))


def text_values(values: Tensor, layout: RowLayout) -> list[list[Tensor]]:
    """Values (B, width, …) of the text behind the last span of every prompt of every row."""
    stops = []
    for b, prompts in enumerate(layout.prompts):
        for text in (layout.question_text(b, prompt) for prompt in prompts):
            stops += [b * layout.width + text.start, b * layout.width + text.stop]
    sizes = np.diff(stops, prepend=0, append=len(layout.prompts) * layout.width)
    texts = iter(values.flatten(0, 1).split(sizes.tolist())[1::2])  # one call for all prompts
    return [[next(texts) for _ in prompts] for prompts in layout.prompts]


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
