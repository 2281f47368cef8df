"""Which columns of a call are prompts, and where the question of each prompt ends.

Reducers that look at the question must choose the same tokens whether a call holds the question
alone, the question and its answer (training, scored choices), tokens generated so far (generation
without a cache) or draft tokens (assisted decoding).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.rows.layout import PromptColumns
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import VisualSpan, VisualTokens

IGNORED = -100  # label of a column that is not trained, as in transformers


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
            prompts.append(PromptColumns(begin, end, end - max(answer, visual)))
        rows.append(prompts)
    return rows


def answer_start(labels: Tensor, start: int, stop: int) -> int:
    """First column of the last run of trained labels in columns `start … stop - 1`, or `stop`.

    Parameters
    ----------
    labels : Tensor of int64 on the CPU, shape (L,)
    """
    trained = (labels[start:stop] != IGNORED).nonzero()[:, 0]
    if not trained.numel():
        return stop
    gaps = (trained.diff() != 1).nonzero()[:, 0]
    return start + int(trained[int(gaps[-1]) + 1] if gaps.numel() else trained[0])


def packed_starts(text_positions: Tensor | None) -> list[list[int]] | None:
    """First columns of packed prompts: positions that do not follow, the rule of transformers.

    Parameters
    ----------
    text_positions : Tensor of int64 on the CPU, shape (B, L) or (1, L), or None
        One position per token, as the caller gave them.

    Returns
    -------
    list of list of int, or None
        Per row; None if no row is packed.
    """
    if text_positions is None:
        return None
    breaks = text_positions.diff(dim=-1) != 1
    if not bool(breaks.any()):
        return None
    return [[0, *(int(c) + 1 for c in row.nonzero()[:, 0])] for row in breaks]


def starts_from_lengths(cumulative: Any, batch: int, width: int) -> list[list[int]] | None:
    """First columns of packed prompts from `cu_seq_lens_q`, which counts over all rows.

    Parameters
    ----------
    cumulative : Tensor of int32, shape (prompts + 1,), or None
    """
    if cumulative is None:
        return None
    bounds = torch.as_tensor(cumulative).tolist()
    rows = [
        [c - b * width for c in bounds if b * width <= c < (b + 1) * width] for b in range(batch)
    ]
    return rows if any(len(row) > 1 for row in rows) else None


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
        sizes = torch.cat([sizes[rest], sizes.new_ones(1)])
    return Reduction(torch.cat([keep[rest], end]), merged, sizes)
