"""What a stage hands to its reducer, span by span, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.engine.layout import LiveSpan, RowLayout
from tokencomp.engine.question import keep_last
from tokencomp.plan import Stage
from tokencomp.tokens import (
    QUERY,
    TOWER_KEYS,
    TOWER_SIGNALS,
    Reduction,
    Signal,
    VisualTokens,
)


@dataclass(frozen=True)
class StageInput:
    """The hidden states before a stage, and the signals that its reducer may read.

    Attributes
    ----------
    x : Tensor, shape (B, n, d)
        Hidden states of all tokens.
    layout
        Where the tokens stand in `x`; its tensors lie on the device of `x`.
    scores : list per sample of list per span of Tensor of float32, shape (span.count,), or None
        Attention scores of the tokens that are left.
    tower
        By signal, values of every span of every sample for all of its tokens, see `TowerProbe`.
    """

    x: Tensor
    layout: RowLayout
    scores: list[list[Tensor]] | None
    tower: Mapping[Signal, list[list[Tensor]]]

    def reductions(
        self, stage: Stage, order: int, counts: list[list[list[int]]]
    ) -> list[list[Reduction]]:
        """The result of the reducer of `stage` for every span of every sample.

        Parameters
        ----------
        order
            Number of the stage in its plan.
        counts
            Per sample, per span: visual tokens that stay after every stage of the plan. Where the
            last token of a question must stay in addition, the count is corrected in place.
        """
        reductions = []
        for b, row in enumerate(self.layout.spans):
            reduced = []
            for j, live in enumerate(row):
                visual, text = counts[b][j][order], live.text_rows()
                # The plan counts visual tokens. Text between the frames of a video lies inside of
                # its span and always stays, so it is added.
                keep = visual + text.numel()
                ends_question = live.stop == self.layout.prompt_of(b, live).question_stop
                # No reducer is needed where all tokens stay, or only the text does.
                if keep == live.count or visual == 0:
                    rows = torch.arange(keep) if keep == live.count else text
                    reduction = Reduction(rows.to(self.x.device))
                else:
                    reduction = stage.reducer.reduced(self._tokens(stage, b, j, live), keep)
                # The next token is predicted from the last column of a question. If a span ends
                # there, its last token stays in any case.
                if ends_question and keep < live.count:
                    reduction = keep_last(reduction, live, self.x[b, live.stop - 1])
                    counts[b][j][order] = reduction.keep.numel() - text.numel()
                reduced.append(reduction)
            reductions.append(reduced)
        return reductions

    def _tokens(self, stage: Stage, b: int, j: int, live: LiveSpan) -> VisualTokens:
        """What the reducer of `stage` sees of live span `j` of sample `b`."""
        special = live.span.special_mask(self.x.device)
        tokens = VisualTokens(
            features=self.x[b, live.start : live.start + live.count],
            grid=live.span.grid,
            special=special if live.index is None else special[live.index],
            index=live.index,
            scores=None if self.scores is None else self.scores[b][j].to(self.x.device),
            query=self._query(stage, b, live),
            kind=live.span.kind,
            sizes=self.layout.sizes_of(b, live),
        )
        tokens.place = (b, j)
        self._add_tower(tokens, stage, b, j)
        return tokens

    def _add_tower(self, tokens: VisualTokens, stage: Stage, b: int, j: int) -> None:
        """Add the signals of the vision tower that the stage needs, for the rows that are left."""
        for signal in TOWER_SIGNALS & stage.reducer.needs:
            values = self.tower[signal][b][j].to(tokens.features.device)
            values = values if tokens.index is None else values[tokens.index]
            if signal == TOWER_KEYS:
                tokens.keys = values
            else:
                tokens.scores = values[:, 0]

    def _query(self, stage: Stage, b: int, live: LiveSpan) -> Tensor | None:
        """Text embeddings after the last span of a prompt, for reducers that need them."""
        if QUERY not in stage.reducer.needs:
            return None
        prompt = self.layout.prompt_of(b, live)
        last = max(s.stop for s in self.layout.spans[b] if prompt.holds(s))
        return self.x[b, last : prompt.question_stop]
