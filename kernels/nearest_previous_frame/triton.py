"""Triton version of ``nearest_previous_frame``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencomp.kernels import checks


@triton.jit
def nearest_kernel(x, similarity, tokens, area, dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosine of BLOCK_T tokens with the tokens `area` rows before them.

    The norms are computed from the same loads as the products.
    """
    # Frames follow one another, so the same place of the previous frame is `area` rows earlier.
    # The first `area` tokens have none: they load nothing and store -inf.
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = (token < tokens) & (token >= area)
    own_row = x + token.to(tl.int64) * dim
    other_row = x + (token.to(tl.int64) - area) * dim
    d = tl.arange(0, BLOCK_D)
    dots = tl.zeros([BLOCK_T], tl.float32)
    square = tl.zeros([BLOCK_T], tl.float32)
    square_before = tl.zeros([BLOCK_T], tl.float32)
    for chunk in range(0, dim, BLOCK_D):
        wide = chunk + d
        mask = valid[:, None] & (wide < dim)[None, :]
        own = tl.load(own_row[:, None] + wide[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(other_row[:, None] + wide[None, :], mask=mask, other=0.0).to(tl.float32)
        dots += tl.sum(own * other, axis=1)
        square += tl.sum(own * own, axis=1)
        square_before += tl.sum(other * other, axis=1)
    norm = tl.sqrt(square) * tl.sqrt(square_before)
    # NaN and infinite features must give NaN, which the caller's check refuses. The second line
    # adds 0 for finite norms and NaN for all others.
    cosine = tl.where(norm == 0.0, 0.0, dots / tl.where(norm == 0.0, 1.0, norm))
    cosine += (square + square_before) * 0.0
    tl.store(similarity + token, tl.where(valid, cosine, -float("inf")), mask=token < tokens)


def nearest_previous_frame(x: Tensor) -> Tensor:
    """See :func:`tokencomp.kernels.nearest_previous_frame`."""
    checks.triton_dtype("x", x)
    x = x.contiguous()
    frames, height, width, dim = x.shape
    similarity = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    tokens = frames * height * width
    if tokens == 0:
        return similarity
    block_t, block_d = blocks(dim)
    nearest_kernel[(triton.cdiv(tokens, block_t),)](
        x, similarity, tokens, height * width, dim,
        BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, num_stages=2,
    )  # fmt: skip
    return similarity


def blocks(dim: int) -> tuple[int, int]:
    """Return (tokens, features) of a tile of 4096 values, so that each thread loads 16 bytes."""
    block_d = min(1024, max(64, triton.next_power_of_2(dim)))
    return max(1, 4096 // block_d), block_d
