"""What the Triton kernels share. Imports Triton: only the ``triton.py`` files import this."""

import functools

import torch
import triton
import triton.language as tl
from tokencomp.kernels.dispatch import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def aligned(batch, head, row, ALIGN: tl.constexpr):
    """The strides, written so that the compiler sees multiples of ALIGN and loads can be wide."""
    return batch // ALIGN * ALIGN, head // ALIGN * ALIGN, row // ALIGN * ALIGN


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a @ b`` in fp32; fp32 operands take three tf32 products (error 2^-21)."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw bits and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def long_dot(
    a_rows, a_inside, b_rows, b_inside, accumulator, DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """``accumulator + a @ b.T`` of rows given by pointers, CHUNK columns at a time.

    For fp32 operands: whole rows of them do not fit the registers.
    """
    for chunk in range(0, DIM, CHUNK):
        d = chunk + tl.arange(0, CHUNK)
        a = tl.load(
            a_rows[:, None] + d[None, :], mask=a_inside[:, None] & (d < DIM)[None, :], other=0.0
        )
        b = tl.load(
            b_rows[:, None] + d[None, :], mask=b_inside[:, None] & (d < DIM)[None, :], other=0.0
        )
        accumulator = dot(a, tl.trans(b), accumulator)
    return accumulator


@triton.jit
def log_sum(top, total):
    """``log(total · exp(top))`` of a running maximum and sum; -inf for an empty sum, NaN stays."""
    some = total != 0.0
    return tl.where(some, top + tl.log2(tl.where(some, total, 1.0)) / LOG2E, -float("inf"))


@triton.jit
def inverse_root(square):
    """``1 / sqrt(square)``, 0 at 0."""
    some = square != 0.0
    return tl.where(some, 1.0 / tl.sqrt(tl.where(some, square, 1.0)), 0.0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 8 under the interpreter (so that splits are tested)."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def alignment(*tensors: torch.Tensor) -> int:
    """8 if every row of the tensors starts at a multiple of 8 elements, else 1.

    Triton itself only looks for multiples of 16, which head dimension 72 (SigLIP) is not.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def padded(size: int) -> int:
    """`size` rounded up to what a dimension of ``tl.dot`` may be."""
    return max(16, triton.next_power_of_2(size))
