"""What a stage hands to its reducer: all spans of a call as one batch; and what it gets back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.engine.rows.compaction import Selection, move_tables
from tokencomp.engine.rows.layout import RowLayout, text_values
from tokencomp.engine.stage.merging import merge_rest
from tokencomp.plan.budgets import Place
from tokencomp.plan.reducer import reduced
from tokencomp.plan.stages import Stage
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import QUERY, Signal, TowerSignal
from tokencomp.tokens.spans import SpanBatch, VisualTokens
from tokencomp.tokens.stacks import rows_of, starts_of


@dataclass(frozen=True)
class StageInput:
    """The hidden states before a stage, and the signals that its reducer may read.

    Attributes
    ----------
    x : Tensor, shape (B, n, d)
        Hidden states of all tokens.
    layout
        Where the tokens stand in `x`; its tensors lie on the device of `x`.
    scores : Tensor of float32, shape (visual tokens that are left,), or None
        Attention scores of the tokens of all spans of all samples, one after the other.
    tower
        By signal, values of every span of every sample for all of its tokens, see `TowerProbe`.
    text_scores
        Per sample, per prompt: lengths of the keys of the text after the last span, (m,); None
        where no reducer reads them.
    norm
        The norm behind the last decoder layer; None where no reducer reads it.
    frames
        Per sample, per span: the last frame before it, see `compared_frames`; None where no reducer
        reads them.
    """

    x: Tensor
    layout: RowLayout
    scores: Tensor | None
    tower: Mapping[Signal, list[list[Tensor]]]
    text_scores: list[list[Tensor]] | None = None
    norm: nn.Module | None = None
    frames: list[list[Tensor | None]] | None = None

    def selection(
        self,
        stage: Stage,
        order: int,
        counts: list[list[list[int]]],
        places: list[list[Place | None]],
    ) -> Selection:
        """Which tokens of every span stay, by the reducer of `stage`.

        Parameters
        ----------
        order
            Number of the stage in its plan.
        counts
            Per sample, per span: visual tokens that stay after every stage of the plan. Where the
            last token of a question must stay in addition, the count is corrected in place.
        places
            Per sample, per span: where it stands among the items of its prompt, or None, as in
            `ForwardPass`.
        """
        spans = self.layout.spans
        # The plan counts visual tokens. Text between the frames of a video lies inside of its span
        # and always stays, so it is added.
        keeps = [
            [counts[b][j][order] + len(live.span.text) for j, live in enumerate(row)]
            for b, row in enumerate(spans)
        ]
        chosen = [
            (b, j)
            for b, row in enumerate(spans)
            for j, live in enumerate(row)
            if keeps[b][j] < live.count and (keeps[b][j] or self.layout.ends_question(b, live))
        ]
        if not chosen:  # no reducer is needed where all tokens stay, or none
            return Selection(keeps, [], None)
        from tokencomp.kernels.dispatch import checked

        batch = self._batch(stage, chosen)
        numbers = [keeps[b][j] for b, j in chosen]
        if all(counts[b][j][order] for b, j in chosen):
            reduction = reduced(stage.reducer, batch, numbers)
        else:
            reduction = self._in_parts(stage, batch, chosen, numbers, order, counts)
        # The next token is predicted from the last column of a question. If a span ends there, its
        # last token stays in any case.
        ends = [self.layout.ends_question(b, spans[b][j]) for b, j in chosen]
        if any(ends):
            parts = [
                keep_last(part, tokens) if end else part
                for part, tokens, end in zip(
                    reduction.split(batch, numbers), batch.spans(), ends, strict=True
                )
            ]
            reduction = Reduction.join(parts, batch)
            for part, (b, j) in zip(parts, chosen, strict=True):
                keeps[b][j] = part.keep.numel()
                counts[b][j][order] = keeps[b][j] - len(spans[b][j].span.text)
        merging = []
        if stage.merge:
            merging = [stage.merges(spans[b][j].span.modality, places[b][j]) for b, j in chosen]
        if any(merging):
            numbers = [keeps[b][j] for b, j in chosen]
            with checked():  # targets come from tables of the host
                reduction = merge_rest(batch, reduction, numbers, merging, stage.reducer.name)
        return Selection(keeps, chosen, reduction)

    def _in_parts(
        self,
        stage: Stage,
        batch: SpanBatch,
        chosen: list[tuple[int, int]],
        numbers: list[int],
        order: int,
        counts: list[list[list[int]]],
    ) -> Reduction:
        """The reduction of `batch`; where no visual token stays, only the text of a span does."""
        parts: list[Reduction] = []
        for tokens, keep, (b, j) in zip(batch.spans(), numbers, chosen, strict=True):
            if counts[b][j][order]:
                parts.append(reduced(stage.reducer, SpanBatch.of(tokens), [keep]))
            else:
                text = self.layout.spans[b][j].span.text_mask(self.x.device)
                text = text if tokens.index is None else text[tokens.index]
                parts.append(Reduction(text.nonzero()[:, 0]))
        return Reduction.join(parts, batch)

    def _batch(self, stage: Stage, chosen: list[tuple[int, int]]) -> SpanBatch:
        """What the reducer of `stage` sees of the spans `chosen`.

        The tables that it needs are built on the host and moved to the device together.
        """
        kept_spans = [self.layout.spans[b][j] for b, j in chosen]
        fixed = [len(live.span.special) + len(live.span.text) for live in kept_spans]
        rows = [
            np.arange(live.start, live.stop) + b * self.layout.width
            for live, (b, _) in zip(kept_spans, chosen, strict=True)
        ]
        tables: dict[str, Any] = {}
        first, last = rows[0][0], rows[-1][-1] + 1
        neighbours = last - first == sum(map(len, rows))
        missing = self.layout.origin is not None and any(not live.whole for live in kept_spans)
        lengths, sizes = [live.count for live in kept_spans], self.layout.sizes
        if not neighbours or missing or sizes is not None:
            tables["columns"] = np.concatenate(rows)
        if missing:
            whole = [live.span.length for live in kept_spans]
            tables["start"] = np.repeat([live.span.start for live in kept_spans], lengths)
            tables["before"] = np.repeat(np.cumsum(whole) - whole, lengths)
        if any(fixed):
            tables["special"] = np.concatenate([live.span.fixed_mask() for live in kept_spans])
        scores, needs = self.scores, stage.needs
        # Spans that keep all of their tokens have scores, but are not in the batch.
        if scores is not None and len(scores) > sum(lengths):
            starts = starts_of([live.count for row in self.layout.spans for live in row])
            before = starts_of([len(row) for row in self.layout.spans])  # spans of other samples
            tables["scored"] = rows_of(starts, [before[b] + j for b, j in chosen])
        moved = move_tables(tables, self.x.device)
        flat, index, full = self.x.flatten(0, 1), None, None
        if self.layout.origin is not None and missing:
            index = self.layout.origin.flatten().index_select(0, moved["columns"]) - moved["start"]
            full = index + moved["before"]  # row in a table of all tokens of these spans
        special = moved.get("special")
        if special is not None:
            special = (special if full is None else special.index_select(0, full)).bool()
        if scores is not None and "scored" in moved:
            scores = scores.index_select(0, moved["scored"])
        queries, texts = None, self.text_scores
        if QUERY in needs:
            queries = self._of_prompts(text_values(self.x, self.layout), chosen)
        batch = SpanBatch(
            features=flat[first:last] if neighbours else flat.index_select(0, moved["columns"]),
            lengths=lengths,
            grids=[live.span.grid for live in kept_spans],
            modalities=[live.span.modality for live in kept_spans],
            fixed=fixed,
            special=special,
            index=index,
            scores=scores,
            sizes=None if sizes is None else sizes.flatten().index_select(0, moved["columns"]),
            queries=queries,
            query_scores=None if texts is None else self._of_prompts(texts, chosen),
            norm=self.norm,
            places=chosen,
            frames=None if self.frames is None else [self.frames[b][j] for b, j in chosen],
        )
        if needs:
            batch.tower = self._tower(needs, chosen, full)
        return batch

    def _tower(
        self, needs: Collection[Signal], chosen: list[tuple[int, int]], full: Tensor | None
    ) -> dict[Signal, Tensor]:
        """Signals of the vision tower among `needs`, for the rows that are left."""
        signals: dict[Signal, Tensor] = {}
        for signal in needs:
            if isinstance(signal, TowerSignal):
                values = torch.cat([self.tower[signal][b][j] for b, j in chosen])
                values = values.to(self.x.device)
                signals[signal] = values if full is None else values.index_select(0, full)
        return signals

    def _of_prompts(self, texts: list[list[Tensor]], chosen: list[tuple[int, int]]) -> list[Tensor]:
        """Values of the text of its prompt for every span; spans of a prompt share one tensor."""
        prompts, spans = self.layout.prompts, self.layout.spans
        moved = [[text.to(self.x.device) for text in row] for row in texts]
        owners = [(b, self.layout.prompt_of(b, spans[b][j])) for b, j in chosen]
        return [moved[b][prompts[b].index(prompt)] for b, prompt in owners]


def keep_last(reduction: Reduction, tokens: VisualTokens) -> Reduction:
    """Exchange a kept row for the last one of a span that ends a question.

    The next token is predicted from the last column, so that column never leaves. The last kept
    patch makes room for it; where only text and special tokens are kept, the count grows by one.
    """
    keep, last = reduction.keep, len(tokens) - 1
    if keep.numel() and int(keep[-1]) == last:
        return reduction
    patches = (~tokens.special[keep]).nonzero()[:, 0]
    rest = torch.ones_like(keep, dtype=torch.bool)
    rest[patches[-1:]] = False
    end = keep.new_tensor([last])
    merged, sizes = reduction.merged, reduction.sizes
    if merged is not None:
        merged = torch.cat([merged[rest], tokens.features[last:].to(merged)])
    if sizes is not None:
        own = sizes.new_ones(1) if tokens.sizes is None else tokens.sizes[last:].to(sizes)
        sizes = torch.cat([sizes[rest], own])
    return Reduction(torch.cat([keep[rest], end]), merged, sizes)
