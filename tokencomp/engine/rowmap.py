"""The map from rows to columns: which tokens of the sequence are held.

A *column* is a position in the uncompressed sequence, over all calls of a conversation, padding
included. A *row* is an index into what is held: hidden states of a call, or a cache layer. A prompt
of eight tokens without columns 2, 3 and 5, which were dropped, and two later tokens:

    column   0  1  2  3  4  5  6  7 | 8  9
    row      0  1  .  .  2  .  3  4 | 5  6      rows 7, dropped 3, length 10
    columns  0  1        4     6  7             stored for the first rows; then consecutive

Samples of a batch have different lengths. Rows are then aligned to the right ("left-padded"), so
that the last row is the last token of every sample, and `mask` is False at the padding rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.engine.memory import Memory
from tokencomp.tokens.tokens import Kept, VisualSpan

Chosen = list[tuple[int, int]]  # (sample, span) of the spans from which a reducer chooses
ROWWISE = ("columns", "real", "weights")  # tensors of a map with one entry per row


@dataclass(frozen=True)
class KeptSpan:
    """Kept tokens of a span: `count` rows from row `start`."""

    span: VisualSpan
    start: int
    count: int

    @cached_property
    def stop(self) -> int:
        return self.start + self.count

    @cached_property
    def whole(self) -> bool:
        return self.count == self.span.length


@dataclass(frozen=True)
class Prompt:
    """Rows `start … stop - 1` of a sample: all of it, or one of several packed prompts.

    Tokens attend to no other prompt of the sample. Rows from `question_stop` on (the answer of a
    training example, generated tokens, or drafts of assisted decoding) do not vote on what is kept.
    """

    start: int
    stop: int
    question_stop: int

    def holds(self, kept: KeptSpan) -> bool:
        """Whether a span belongs to this prompt."""
        return self.start <= kept.start < self.stop


@dataclass
class RowMap:
    """The column of every row, and which rows are padding.

    Cache layers, segments and running calls each hold one. Columns of a call's map count from the
    first column of the call; those of a cache's map count over all calls.

    Attributes
    ----------
    rows : int
        Rows of every sample, padding rows included.
    dropped : int
        Columns minus rows, the same for every sample, since shorter ones have padding rows. The
        drawing in `tokencomp.engine` has an example.
    columns : Tensor of int64, shape (B, m), m ≤ rows, or None
        Column of the first m rows, ascending, of no meaning at padding rows; the columns of later
        rows are consecutive. None: row i holds column i.
    real : Tensor of bool, shape (B, m), or None
        False at padding rows; rows after the first m are real. None: there are no padding rows, or,
        in the map of a prompt, `mask` has not made it from `lengths` yet. Read it by `mask`.
    starts : Tensor of int64, shape (B,), or None
        First real column of every sample; None: 0, or unknown.
    weights : Tensor of float32, shape (B, m), m ≤ rows, or None
        Number of tokens that the first m rows represent, 1 at padding rows; later rows represent
        one. None: one each. In a cache attention adds their logarithms
        (`tokencomp.engine.weights`). `lengths`, `spans` and `prompts` are in the map of a prompt
        only.
    lengths : list of int
        Real rows per sample, aligned to the right.
    spans
        Kept spans per sample, in order.
    prompts
        Prompts per sample, in order; together they cover the real rows.
    memory
        What the rows show of pictures. Only in the first layer with rows of a cache.
    """

    rows: int
    dropped: int = 0
    columns: Tensor | None = None
    real: Tensor | None = None
    starts: Tensor | None = None
    weights: Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    spans: list[list[KeptSpan]] = field(default_factory=list)
    prompts: list[list[Prompt]] = field(default_factory=list)
    memory: Memory = Memory()  # noqa: RUF009  # it never changes

    @classmethod
    def of_prompt(
        cls,
        rows: int,
        lengths: list[int],
        spans: list[list[VisualSpan]],
        prompts: list[list[Prompt]] | None = None,
    ) -> RowMap:
        """The map of an uncompressed, left-padded call; by default with one prompt per sample."""
        kept = [[KeptSpan(s, s.start, s.length) for s in sample] for sample in spans]
        if prompts is None:
            prompts = [[Prompt(rows - n, rows, rows)] for n in lengths]
        return cls(rows, lengths=lengths, spans=kept, prompts=prompts)

    # -- rows and columns -----------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Number of columns, which transformers uses as the length of the sequence."""
        return self.rows + self.dropped

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """False at padding rows, bool (B, rows); None if all are real. `real` keeps the result."""
        real = self.real
        if real is None:
            if all(n == self.rows for n in self.lengths):
                return None
            # Lengths 4 and 5 of 5 rows: · x x x x and x x x x x.
            first = self.rows - np.asarray(self.lengths)
            real = torch.from_numpy(np.arange(self.rows)[None] >= first[:, None])
        # Rows written since the map was stored are real.
        if real.shape[1] < self.rows:
            real = nn.functional.pad(real, (0, self.rows - real.shape[1]), value=True)
        self.real = real if device is None else real.to(device)
        return self.real[:, : self.rows]

    def all_columns(self, batch: int, device: torch.device) -> Tensor:
        """Column of every row, int64 (B, rows)."""
        if self.columns is None:
            return torch.arange(self.rows, device=device).expand(batch, -1)
        known = self.columns.to(device)
        if known.shape[1] == self.rows:
            return known
        later = torch.arange(known.shape[1], self.rows, device=device) + self.dropped
        return torch.cat([known, later.expand(batch, -1)], dim=1)

    def all_weights(self, batch: int, device: torch.device) -> Tensor:
        """Number of tokens that every row represents, float32 (B, rows)."""
        if self.weights is None:
            return torch.ones(batch, self.rows, device=device)
        known = self.weights.to(device)
        if known.shape[1] == self.rows:
            return known
        return nn.functional.pad(known, (0, self.rows - known.shape[1]), value=1.0)

    def log_weights(self, rows: int, dtype: torch.dtype) -> Tensor:
        """log(weight) of the first `rows` rows, (B, 1, 1, rows), as a mask of numbers; later rows
        weigh one.
        """
        weights = self.weights
        assert weights is not None
        logs = nn.functional.pad(weights.log(), (0, rows - weights.shape[1]))
        return logs.to(dtype)[:, None, None]

    def first_column(self) -> Tensor:
        """First real column of every sample of a prompt, int64 (B,) on the CPU."""
        first = torch.tensor([self.rows - n for n in self.lengths])
        if self.columns is None:
            return first
        return self.columns.cpu().gather(1, first[:, None])[:, 0]

    # -- what changes a map ---------------------------------------------------------------------

    def append(self, new: RowMap, batch: int, device: torch.device) -> RowMap:
        """The map of these rows followed by those of a call."""
        columns = joined_columns(self, new, batch, device)
        real = joined_mask(self, new.mask(device), new.rows, device)
        rows, dropped = self.rows + new.rows, self.dropped + new.dropped
        weights = joined_weights(self, new, batch, device)
        return RowMap(rows, dropped, columns, real, self.starts, weights)

    def keep_rows(self, rows: Tensor, batch: int) -> RowMap:
        """The map of some rows (n,) only, the same and real in every sample."""
        columns, weights = self.all_columns(batch, rows.device)[:, rows], self.weights
        if weights is not None:
            weights = self.all_weights(batch, rows.device)[:, rows]
        return RowMap(
            rows.numel(), self.length - rows.numel(), columns, starts=self.starts, weights=weights,
            memory=self.memory.cut(rows),
        )  # fmt: skip

    def cut(self, rows: int) -> RowMap:
        memory = self.memory
        if rows < memory.end:
            memory = memory.cut(torch.arange(rows))
        return self._changed(lambda t: t[:, :rows], ROWWISE, rows=rows, memory=memory)

    def select(self, change: Callable[[Tensor], Tensor]) -> RowMap:
        """The map of a cache whose samples are reordered, repeated or selected, as by beam search.

        `change` maps a tensor (B, …) to one of the new batch.
        """
        return self._changed(change, (*ROWWISE, "starts"), memory=self.memory.select(change))

    def keep(
        self, counts: list[list[int]], chosen: Chosen, kept: Kept | None, device: torch.device
    ) -> tuple[RowMap, Tensor, Tensor | None]:
        """The map after a stage, and which rows it keeps.

        One index table with the rows of text and whole spans is built on the host and moved to the
        device, where the choice of the reducer is filled in.

        `counts` are kept tokens per sample, per span; `chosen` the (sample, span) from which a
        reducer chose, in order; `kept` its choice over all of them, concatenated. Returns also the
        row of this map for every new row, int64 (B, new rows), 0 at padding; and the flat index
        (sample · new rows + row) of the rows that the reducer chose, int64, or None.
        """
        # Length of every sample after the stage; rows are aligned to the right.
        lengths = [
            n - sum(old.count for old in spans) + sum(left)
            for n, spans, left in zip(self.lengths, self.spans, counts, strict=True)
        ]
        rows, some = max(lengths), set(chosen)
        table = np.zeros((len(lengths), rows), dtype=np.int64)
        after, sources, targets = [], [], []
        for b, (spans, left) in enumerate(zip(self.spans, counts, strict=True)):
            at, cursor, moved = rows - lengths[b], self.rows - self.lengths[b], []
            for j, (old, count) in enumerate(zip(spans, left, strict=True)):
                # Text before the span, then the span: whole, or (`some`) as the reducer chose.
                text = old.start - cursor
                table[b, at : at + text] = np.arange(cursor, old.start)
                at += text
                moved.append(KeptSpan(old.span, at, count))
                if (b, j) in some:
                    sources.append(np.arange(old.start, old.stop))
                    targets.append(np.arange(at, at + count) + b * rows)
                else:
                    table[b, at : at + count] = np.arange(old.start, old.start + count)
                at, cursor = at + count, old.stop
            table[b, at:] = np.arange(cursor, self.rows)
            after.append(moved)
        tables, flat = {"index": table.ravel()}, None
        if kept is not None:
            tables |= {"flat": np.concatenate(targets), "source": np.concatenate(sources)}
        # One copy to the device, where the rows that the reducer chose are filled in.
        moved_tables = move_tables(tables, device)
        index = moved_tables["index"]
        if kept is not None:
            flat, source = moved_tables["flat"], moved_tables["source"]
            index.index_copy_(0, flat, source.index_select(0, kept.patches.to(device)))
        index = index.view(table.shape)
        columns = index if self.columns is None else self.columns.gather(1, index)
        new = RowMap(
            rows, self.length - rows, columns, lengths=lengths, spans=after,
            prompts=[self._shrunk(b, moved, rows - lengths[b]) for b, moved in enumerate(after)],
        )  # fmt: skip
        if self.weights is not None or (kept is not None and kept.weights is not None):
            new.weights = self._weights_after(new, index, flat, kept)
        return new, index, flat

    def _shrunk(self, sample: int, after: list[KeptSpan], padding: int) -> list[Prompt]:
        """Prompts of a sample, moved for spans that shrank to `after`, after `padding` rows."""
        shift, spans = padding - self.rows + self.lengths[sample], self.spans[sample]
        removed = [
            (old.start, old.count - new.count) for old, new in zip(spans, after, strict=True)
        ]
        prompts = []
        # An edge moves right by the change of padding, and left by the tokens dropped before it.
        for p in self.prompts[sample]:
            edges = (p.start, p.stop, p.question_stop)
            gone = [sum(n for start, n in removed if start < edge) for edge in edges]
            prompts.append(Prompt(*(e + shift - n for e, n in zip(edges, gone, strict=True))))
        return prompts

    def _weights_after(
        self, new: RowMap, index: Tensor, flat: Tensor | None, kept: Kept | None
    ) -> Tensor:
        if self.weights is None:
            weights = torch.ones(index.shape, device=index.device)
        else:
            # `index` is 0 at padding rows, which gathers the weight of row 0.
            weights, mask = self.weights.gather(1, index), new.mask(index.device)
            weights = weights if mask is None else weights.masked_fill(~mask, 1.0)
        # Merged rows have the weights that the reducer returns; they contain those before.
        if kept is not None and kept.weights is not None and flat is not None:
            weights.view(-1).index_copy_(0, flat, kept.weights.to(weights))
        return weights

    def to(self, device: torch.device) -> RowMap:
        return self._changed(lambda t: t.to(device), ROWWISE)

    def _changed(
        self, change: Callable[[Tensor], Tensor], names: Sequence[str], **others: Any
    ) -> RowMap:
        """The map with a change of the named tensors that it has, and with `others`."""
        tensors = {name: getattr(self, name) for name in names}
        others |= {name: change(t) for name, t in tensors.items() if t is not None}
        return replace(self, **others)

    # -- spans and prompts ----------------------------------------------------------------------

    @cached_property
    def packed(self) -> bool:
        """Whether a sample holds more than one prompt."""
        return any(len(prompts) > 1 for prompts in self.prompts)

    def spans_of(self, sample: int, prompt: Prompt) -> list[KeptSpan]:
        return [kept for kept in self.spans[sample] if prompt.holds(kept)]

    def question_text(self, sample: int, prompt: Prompt) -> slice:
        """Rows of the question after the last span of a prompt; without spans, all of its rows."""
        first = max((k.stop for k in self.spans_of(sample, prompt)), default=prompt.start)
        return slice(first, prompt.question_stop)

    def ends_question(self, sample: int, kept: KeptSpan) -> bool:
        """Whether a question ends in a span, so that its last row predicts the next token."""
        prompt = next(p for p in self.prompts[sample] if p.holds(kept))
        return kept.stop == prompt.question_stop

    def offsets_of(self, sample: int, kept: KeptSpan) -> Tensor | None:
        """Offsets in a span of its kept tokens, int64 (count,); None: all of them."""
        if kept.whole or self.columns is None:
            return None
        return self.columns[sample, kept.start : kept.stop] - kept.span.start


# -- the rows of earlier calls and of this one --------------------------------------------------


def joined_columns(past: RowMap, new: RowMap, batch: int, device: torch.device) -> Tensor | None:
    """Column of all rows, cached and new, (B, rows); None: row i is column i."""
    if past.columns is None and new.columns is None:
        return None
    columns = new.all_columns(batch, device) + past.length
    return torch.cat([past.all_columns(batch, device), columns], dim=1)


def joined_weights(past: RowMap, new: RowMap, batch: int, device: torch.device) -> Tensor | None:
    """Number of tokens that all rows represent, cached and new, (B, rows); None: one each."""
    if past.weights is None and new.weights is None:
        return None
    return torch.cat([row_map.all_weights(batch, device) for row_map in (past, new)], dim=1)


def joined_mask(
    past: RowMap, new: Tensor | None, rows: int, device: torch.device | None = None
) -> Tensor | None:
    """False at padding rows, cached and new, (B, all rows); None: all rows are real.

    `new` (B, rows) is the mask of the `rows` rows of this call, or None.
    """
    before = past.mask(device)
    if new is None:
        if before is None:
            return None
        new = before.new_ones(len(before), rows)
    elif before is None:
        before = new.new_ones(len(new), past.rows)
    return torch.cat([before.to(new.device), new], dim=1)


# -- values by row, by visual token, and by text token ------------------------------------------


def visual_rows(row_map: RowMap, device: torch.device) -> Tensor:
    """Flat indices (sample · rows + row) of all kept visual tokens, in order."""
    numbers = [
        np.arange(kept.start, kept.stop) + b * row_map.rows
        for b, sample in enumerate(row_map.spans)
        for kept in sample
    ]
    return torch.from_numpy(np.concatenate(numbers)).to(device)


def visual_values(values: Tensor, row_map: RowMap) -> Tensor:
    """Select from values per row, (B, rows), those of kept visual tokens, (tokens,)."""
    return values.flatten().index_select(0, visual_rows(row_map, values.device))


def text_values(values: Tensor, row_map: RowMap) -> list[list[Tensor]]:
    """Values (B, rows, …) of the question after the last span of every prompt of every sample."""
    stops = []
    for b, prompts in enumerate(row_map.prompts):
        for text in (row_map.question_text(b, prompt) for prompt in prompts):
            stops += [b * row_map.rows + text.start, b * row_map.rows + text.stop]
    # stops 3 5 9 12 of two prompts: parts [0:3] [3:5] [5:9] [9:12] [12:], of text every second one.
    sizes = np.diff(stops, prepend=0, append=len(row_map.prompts) * row_map.rows)
    texts = iter(values.flatten(0, 1).split(sizes.tolist())[1::2])  # one split for all prompts
    return [[next(texts) for _ in prompts] for prompts in row_map.prompts]


def kept_values(values: Tensor, before: RowMap, after: RowMap, index: Tensor) -> Tensor:
    """Keep the entries of tokens that are still in `after`.

    `values` has one entry per visual token of `before`; `index` (B, rows of `after`) is the row
    of `before` of every row of `after`.
    """
    # Spread over the rows of `before`, gather those of `after`, read the visual ones.
    table = values.new_zeros(index.shape[0] * before.rows)
    table[visual_rows(before, values.device)] = values
    left = table.view(-1, before.rows).gather(1, index).flatten()
    return left[visual_rows(after, values.device)]


def move_tables(tables: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Move integer tables by name from the host to a device, as int64, in one copy."""
    if not tables:
        return {}
    parts = [np.asarray(values, dtype=np.int64) for values in tables.values()]
    packed = torch.from_numpy(np.concatenate(parts)).to(device)
    return dict(zip(tables, packed.split([len(part) for part in parts]), strict=True))
