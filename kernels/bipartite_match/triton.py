"""Triton version of ``bipartite_match``: products, norms and maximum in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.checks import starts, table
from tokencomp.kernels.tile import dot, inverse_root


@triton.jit
def match_kernel(
    x, first_row, similarity, partner, stride, dim, frames,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Best odd partner of BLOCK_A even rows of one frame.

    The grid is (frames, tiles of even rows). The program keeps the running maximum over blocks of
    odd rows. Norms are accumulated from the tiles that the product loads anyway, so there is
    neither a normalisation pass nor a normalised copy of the features.
    """
    frame = tl.program_id(0)
    start = tl.load(first_row + frame)
    rows = tl.load(first_row + frame + 1) - start
    # Number of an even row among the even ones; row 2a of the frame. Odd row b is row 2b + 1.
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    a_row = 2 * a
    d = tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_A], -float("inf"), tl.float32)
    best_row = tl.full([BLOCK_A], -1, tl.int32)
    a_square = tl.zeros([BLOCK_A], tl.float32)
    poison = 0.0
    x += start.to(tl.int64) * stride
    odds = rows // 2
    # The grid fits the longest frame; the last programs of shorter frames have no row.
    if tl.program_id(1) * BLOCK_A * 2 < rows:
        # Odd rows in the outer loop, features in the inner one: only complete cosines are compared.
        for first in range(0, odds, BLOCK_B):
            b_row = 2 * (first + tl.arange(0, BLOCK_B)) + 1
            dots = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
            # From 0 again in each block of odd rows: every block adds the whole square of the norm.
            a_square = tl.zeros([BLOCK_A], tl.float32)
            b_square = tl.zeros([BLOCK_B], tl.float32)
            for chunk in range(0, dim, BLOCK_D):
                wide = chunk + d
                a_tile = tl.load(
                    x + a_row.to(tl.int64)[:, None] * stride + wide[None, :],
                    mask=(a_row < rows)[:, None] & (wide < dim)[None, :],
                    other=0.0,
                )
                b_tile = tl.load(
                    x + b_row.to(tl.int64)[:, None] * stride + wide[None, :],
                    mask=(b_row < rows)[:, None] & (wide < dim)[None, :],
                    other=0.0,
                )
                dots = dot(a_tile, tl.trans(b_tile), dots)
                a_wide = a_tile.to(tl.float32)
                b_wide = b_tile.to(tl.float32)
                a_square += tl.sum(a_wide * a_wide, axis=1)
                b_square += tl.sum(b_wide * b_wide, axis=1)
            # Infinite or NaN features must reach the result: comparisons would drop them.
            poison += tl.sum(b_square * 0.0, axis=0)
            # The norm of the even row is the same for all partners, so it is applied at the end.
            score = dots * inverse_root(b_square)[None, :]
            # Columns after the last odd row have product 0, which would beat negative cosines.
            score = tl.where((b_row < rows)[None, :], score, -float("inf"))
            value, index = tl.max(score, axis=1, return_indices=True)
            # `tl.max` takes the first of equals in a block, and > keeps an earlier equal.
            better = value > best
            best = tl.where(better, value, best)
            best_row = tl.where(better, 2 * (first + index) + 1, best_row)
        best_dot = tl.where(best_row >= 0, best, 0.0)
        cosine = best_dot * inverse_root(a_square) + poison + a_square * 0.0
        # The program of an even row also writes the entry of the odd row after it.
        place = start + a_row
        tl.store(similarity + place, tl.where(odds > 0, cosine, -float("inf")), mask=a_row < rows)
        partner_row = tl.where(best_row >= 0, start + best_row, -1)
        tl.store(partner + place, partner_row.to(tl.int64), mask=a_row < rows)
        tl.store(similarity + place + 1, -float("inf"), mask=a_row + 1 < rows)
        tl.store(partner + place + 1, tl.full([BLOCK_A], -1, tl.int64), mask=a_row + 1 < rows)


def bipartite_match(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """See :func:`tokencomp.kernels.bipartite_match.naive`."""
    checks.triton_dtype("x", x)
    checks.grid_size("tiles of a frame", max(lengths, default=0) // 64)
    x = checks.rows_contiguous(x)
    similarity = torch.empty(len(x), dtype=torch.float32, device=x.device)
    partner = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return similarity, partner
    evens = (max(lengths) + 1) // 2
    block_a, block_b, block_d, warps = blocks(evens, x.element_size())
    match_kernel[(len(lengths), triton.cdiv(evens, block_a))](
        x, table([*starts(lengths), len(x)], x.device), similarity, partner,
        x.stride(0), x.shape[1], len(lengths),
        BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_D=block_d, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return similarity, partner


def blocks(evens: int, itemsize: int) -> tuple[int, int, int, int]:
    """Return (even rows, odd rows, features, warps) of a tile.

    A program takes few even rows: frames are small, so several programs must share one to fill the
    GPU. The odd rows of a frame come from the cache for all but the first of these programs.
    """
    if itemsize == 4:
        return 32, 32 if evens <= 32 else 64, 32, 4
    if evens <= 16:
        return 16, 16, 128, 4
    return 32, 64 if evens <= 64 else 128, 64, 4
