"""Which columns of a call are real, which are prompts, and where the question of each ends.

Inside of a compressed call, rows are aligned to the right ("left-padded"). Batches that are padded
on the right, as most collators for training do, are aligned at entry and spread out afterwards.

Reducers that look at the question must choose the same tokens whether a call holds the question
alone, the question and its answer (training, scored choices), tokens generated so far (generation
without a cache) or draft tokens (assisted decoding).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.engine.rows.layout import KeptSpan, PromptColumns, RowLayout
from tokencomp.errors import PaddingError
from tokencomp.tokens.spans import VisualSpan

IGNORED = -100  # label of a column that is not trained, as in transformers


def real_columns(mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Which columns of this call the attention mask shows, bool on the CPU, shape (B, L)."""
    batch, width = shape
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    real = mask[:, -width:].bool().cpu()
    empty = np.flatnonzero(~real.numpy().any(1))
    if len(empty):
        raise PaddingError(
            f"sample {empty[0]}: attention_mask hides all of its {width} tokens. Every sample of a "
            "prompt with images or videos needs a token; leave the sample out of the batch."
        )
    return real


def left_padded(real: Tensor) -> bool:
    """Whether every row is hidden columns followed by shown ones."""
    return bool((np.diff(real.numpy().astype(np.int8), axis=1) >= 0).all())


def aligned_layout(
    real: Tensor, spans: list[list[VisualSpan]], prompts: list[list[PromptColumns]]
) -> RowLayout:
    """The layout of a call whose mask is not left-padded: its real columns, aligned to the right.

    A column that the attention mask hides is left out, which equals masking it. `real` (B, L), on
    the CPU, is False there; `spans` and `prompts` stand in columns of the caller's batch.
    """
    columns = [row.nonzero()[:, 0] for row in real]
    width = max(c.numel() for c in columns)
    shifts = [width - c.numel() for c in columns]
    # place[b][c]: the new column of the first real token at or behind the caller's column c
    ends = nn.functional.pad(real.long().cumsum(1), (1, 0))
    place = [(row + shift).tolist() for row, shift in zip(ends, shifts, strict=True)]
    live = []
    for b, row in enumerate(spans):
        for span in row:
            _check_visible(real[b, span.start : span.stop], b, span)
        live.append([KeptSpan(s, place[b][s.start], s.length) for s in row])
    moved = [
        [
            PromptColumns(at[p.start], at[p.stop], at[p.question_stop])
            for p in row
            if at[p.stop] > at[p.start]
        ]
        for at, row in zip(place, prompts, strict=True)
    ]
    origin = torch.stack(
        [nn.functional.pad(c, (s, 0)) for c, s in zip(columns, shifts, strict=True)]
    )
    return RowLayout(width, [c.numel() for c in columns], live, origin, prompts=moved)


def _check_visible(real: Tensor, sample: int, span: VisualSpan) -> None:
    hidden = real.numel() - int(real.sum())
    if hidden:
        raise PaddingError(
            f"sample {sample}: attention_mask hides {hidden} of the {span.length} tokens of the "
            f"{span.modality} that begins at column {span.start}. It may hide padding and text; "
            "give whole images and videos, or leave them out of the prompt."
        )


def build_prompts(
    real: Tensor,
    spans: list[list[VisualSpan]],
    starts: list[list[int]] | None = None,
    labels: Tensor | None = None,
    generated: int = 0,
) -> list[list[PromptColumns]]:
    """The prompts of every row, in columns of the caller's batch.

    Parameters
    ----------
    real : Tensor of bool on the CPU, shape (B, L)
        False at columns that the attention mask hides.
    spans
        Visual spans per row.
    starts
        First columns of the prompts packed into each row; None: one prompt per row.
    labels : Tensor of int64, shape (B, L), or None
        The answer begins with the last run of labels that are trained.
    generated
        How many of the last columns were generated or drafted; used where there are no labels.
    """
    labels = None if labels is None or labels.shape != real.shape else labels.cpu()
    rows = []
    for b, row in enumerate(real.numpy()):
        columns = np.flatnonzero(row)
        first, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        bounds = [first, *(s for s in (starts[b] if starts else ()) if first < s < stop), stop]
        prompts = []
        for begin, end in itertools.pairwise(bounds):
            visual = max((s.stop for s in spans[b] if begin <= s.start < end), default=begin)
            answer = end - generated
            if labels is not None:
                answer = answer_start(labels[b], begin, end)
            prompts.append(PromptColumns(begin, end, max(answer, visual)))
        rows.append(prompts)
    return rows


def answer_start(labels: Tensor, start: int, stop: int) -> int:
    """First column of the last run of trained labels (L,) in `start … stop - 1`, or `stop`."""
    trained = (labels[start:stop] != IGNORED).nonzero()[:, 0]
    if not trained.numel():
        return stop
    gaps = (trained.diff() != 1).nonzero()[:, 0]
    return start + int(trained[int(gaps[-1]) + 1] if gaps.numel() else trained[0])


def packed_starts(text_positions: Tensor | None) -> list[list[int]] | None:
    """First columns of packed prompts: positions that do not follow, the rule of transformers.

    Per row of positions as the caller gave them, (B, L) or (1, L) on the CPU; None if no row is
    packed.
    """
    if text_positions is None:
        return None
    breaks = text_positions.diff(dim=-1) != 1
    if not bool(breaks.any()):
        return None
    return [[0, *(int(c) + 1 for c in row.nonzero()[:, 0])] for row in breaks]


def starts_from_lengths(cumulative: Any, batch: int, width: int) -> list[list[int]] | None:
    """First columns of packed prompts from `cu_seq_lens_q` (prompts + 1,), over all rows."""
    if cumulative is None:
        return None
    bounds = torch.as_tensor(cumulative).tolist()
    rows = [
        [c - b * width for c in bounds if b * width <= c < (b + 1) * width] for b in range(batch)
    ]
    return rows if any(len(row) > 1 for row in rows) else None
