"""Attention masks of any shape: which columns are real, and where they stand once aligned.

Inside of a compressed call, rows are aligned to the right ("left-padded"). Batches that are padded
on the right, as most collators for training do, are aligned at entry and spread out afterwards.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.engine.rows.layout import LiveSpan, PromptColumns, RowLayout
from tokencomp.errors import PaddingError
from tokencomp.tokens.spans import VisualSpan


def real_columns(mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Which columns of this call the attention mask shows, bool on the CPU, shape (B, L).

    Raises
    ------
    PaddingError
        A sample without any token.
    """
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

    A column that the attention mask hides is left out, which equals masking it.

    Parameters
    ----------
    real : Tensor of bool on the CPU, shape (B, L)
        False at columns that the mask hides.
    spans, prompts
        In columns of the caller's batch.

    Raises
    ------
    PaddingError
        The mask hides a part of a span.
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
        live.append([LiveSpan(s, place[b][s.start], s.length) for s in row])
    moved = [
        [
            PromptColumns(at[p.start], at[p.stop], at[p.stop] - at[p.question_stop])
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
            f"{span.kind} that begins at column {span.start}. It may hide padding and text; give "
            "whole images and videos, or leave them out of the prompt."
        )
