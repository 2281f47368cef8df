"""Device functions and launch helpers that the Triton kernels share.

This module imports Triton, so only the ``triton.py`` files may import it.
"""

import functools

import torch
import triton
import triton.language as tl

from tokencomp.kernels.dispatch import interpreting

# GPUs compute powers of 2: exp(x) is exp2(x · LOG2E).
LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def aligned(batch, head, row, ALIGN: tl.constexpr):
    """Return the strides in a form that shows the compiler that they are multiples of ALIGN.

    The division and multiplication change no value (see :func:`alignment`), but they prove to the
    compiler that rows start at aligned addresses, so that it emits wide loads.
    """
    return batch // ALIGN * ALIGN, head // ALIGN * ALIGN, row // ALIGN * ALIGN


@triton.jit
def dot(a, b, accumulator):
    """Compute ``accumulator + a @ b`` in fp32.

    Operands in fp32 are multiplied as three tf32 products (relative error about 2^-21), because
    tensor cores have no fp32 product and a single tf32 product keeps 10 mantissa bits only.
    """
    if INTERPRETED:
        # The interpreter stores bfloat16 as raw bits and would multiply these bits as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def long_dot(
    a_rows, a_inside, b_rows, b_inside, accumulator, DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """Compute ``accumulator + a @ b.T`` for rows at pointers, CHUNK columns at a time.

    Tiles of complete fp32 rows do not fit into the registers, so both operands are loaded chunk by
    chunk.
    """
    for chunk in range(0, DIM, CHUNK):
        # Features after the last are 0 in both operands and add nothing.
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
def full_dot(a_rows, a_inside, b_rows, b_inside, dim, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Compute ``a @ b.T`` of BLOCK rows each at pointers, with products in full fp32.

    The error of three tf32 products would distinguish a row from its copy.
    """
    dots = tl.zeros([BLOCK, BLOCK], tl.float32)
    for chunk in range(0, dim, CHUNK):
        d = chunk + tl.arange(0, CHUNK)
        inside = (d < dim)[None, :]
        a = tl.load(a_rows[:, None] + d[None, :], mask=a_inside[:, None] & inside, other=0.0)
        b = tl.load(b_rows[:, None] + d[None, :], mask=b_inside[:, None] & inside, other=0.0)
        dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
    return dots


@triton.jit
def log_sum(top, total):
    """Return ``log(total · exp(top))`` of a running maximum and sum.

    An empty sum gives -inf, and NaN propagates.
    """
    nonzero = total != 0.0
    return tl.where(nonzero, top + tl.log2(tl.where(nonzero, total, 1.0)) / LOG2E, -float("inf"))


@triton.jit
def inverse_root(square):
    """Return ``1 / sqrt(square)``, and 0 where `square` is 0."""
    nonzero = square != 0.0
    return tl.where(nonzero, 1.0 / tl.sqrt(tl.where(nonzero, square, 1.0)), 0.0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU.

    Under the interpreter the number is 8, so that the tests also cover split key ranges.
    """
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def alignment(*tensors: torch.Tensor) -> int:
    """Return 8 if every row of the tensors starts at a multiple of 8 elements, otherwise 1.

    Triton itself detects multiples of 16 only. The head dimension 72 of SigLIP is a multiple of 8
    but not of 16, and would lose its wide loads.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def padded(size: int) -> int:
    """Round `size` up to a valid dimension of ``tl.dot``: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))
