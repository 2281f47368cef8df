"""Triton version of ``topk_stable``, over ragged spans: two launches for any number of spans.

The first counts how many scores of its span are ahead of each score, which is its rank. The second
writes the rows of the best ranks in ascending order. Nothing is sorted, so ties need no care.
"""

import torch
import triton
import triton.language as tl
from tokencomp.kernels.topk_stable import naive
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.checks import starts, table

# Longest span whose ranks are counted. Counting takes n² comparisons; longer spans are sorted.
LONGEST = 32768
# Rows of a program, and scores that it compares them with at a time.
BLOCKS = (32, 128)


# Scores of one span with keep count 3:
#     row                 0  1  2  3  4
#     score               3  7  3  9  7
#     scores ahead        3  1  4  0  2     row 2 ties with row 0 and comes after it
#     chosen (ahead < 3)  0  1  0  1  1
#     cumsum - 1          -  0  -  1  2     place of rows 1, 3 and 4 among the picks
@triton.jit
def rank_kernel(
    scores, first_row, first_pick, chosen, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Whether each of BLOCK_I rows is among the best of its span, int8.

    The grid is (spans, blocks of rows) for the longest span.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    count = tl.load(first_pick + span + 1) - tl.load(first_pick + span)
    if tl.program_id(1) * BLOCK_I < rows:
        i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        own = tl.load(scores + start + i, mask=i < rows, other=0.0)
        ahead = tl.zeros([BLOCK_I], tl.int32)
        for begin in range(0, rows, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            # -inf is a valid score too, so `inside` excludes rows after the span, not their value.
            other = tl.load(scores + start + j, mask=j < rows, other=-float("inf"))
            better = other[None, :] > own[:, None]
            lower = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
            inside = (j < rows)[None, :]
            ahead += tl.sum((inside & (better | lower)).to(tl.int32), axis=1)
        tl.store(chosen + start + i, (ahead < count).to(tl.int8), mask=i < rows)


@triton.jit
def pack_kernel(chosen, first_row, first_pick, picks, BLOCK: tl.constexpr):
    """Write the chosen rows of one span in ascending order. The grid is (spans,)."""
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    stop = tl.load(first_row + span + 1)
    place = tl.load(first_pick + span)
    for begin in range(start, stop, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        flag = tl.load(chosen + row, mask=row < stop, other=0).to(tl.int32)
        at = place + tl.cumsum(flag, axis=0) - 1
        tl.store(picks + at, row.to(tl.int64), mask=flag != 0)
        place += tl.sum(flag, axis=0)


def topk_stable(scores: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    """See :func:`tokencomp.kernels.topk_stable.naive`."""
    if max(lengths) > LONGEST:
        return naive(scores, counts, lengths)
    checks.int32_sizes(scores=len(scores))
    scores = scores.contiguous()
    picks = torch.empty(sum(counts), dtype=torch.int64, device=scores.device)
    if len(picks) == 0:
        return picks
    chosen = torch.empty(len(scores), dtype=torch.int8, device=scores.device)
    # Both tables have an entry more than there are spans, for the end of the last one.
    first_row = table(starts([*lengths, 0]), scores.device)
    first_pick = table(starts([*counts, 0]), scores.device)
    own, others = BLOCKS
    rank_kernel[(len(lengths), triton.cdiv(max(lengths), own))](
        scores, first_row, first_pick, chosen, BLOCK_I=own, BLOCK_J=others, num_warps=4
    )
    pack_kernel[(len(lengths),)](chosen, first_row, first_pick, picks, BLOCK=1024, num_warps=4)
    return picks
