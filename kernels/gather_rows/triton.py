"""Triton version of ``gather_rows``: one launch for all tensors of a layer."""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Number of tensors per launch: hidden states, cos, sin, mask, positions, keys and values of a layer
# fit into one. More tensors are split over several launches.
MAX_TENSORS = 8


@triton.jit
def copy_tile(
    source, out, index, tile, samples, out_rows, width, strides, out_strides, leads,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy a tile of BLOCK_R rows × BLOCK_C columns of one tensor.

    Rows of all leading dimensions and samples form one range, so that a tile can span samples. A
    tensor with few rows then still fills its tiles.
    """
    tiles_across = (width + BLOCK_C - 1) // BLOCK_C
    # Row of the range lead · samples · M, for example of (3, B, M) M-RoPE positions with 3 leads.
    row = tile // tiles_across * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile % tiles_across * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < leads * samples * out_rows
    lead = (row // (samples * out_rows)).to(tl.int64)
    pair = row % (samples * out_rows)
    at = tl.load(index + pair, mask=inside, other=-1).to(tl.int64)
    sample = (pair // out_rows).to(tl.int64)
    place = (pair % out_rows).to(tl.int64)
    mask = inside[:, None] & (column < width)[None, :]
    begin = lead * strides[0] + sample * strides[1] + at * strides[2]
    present = mask & (at >= 0)[:, None]
    # Padding rows are stored as the zeros of masked loads, without a second pass.
    value = tl.load(source + begin[:, None] + column[None, :], mask=present, other=0)
    begin_out = lead * out_strides[0] + sample * out_strides[1] + place * out_strides[2]
    tl.store(out + begin_out[:, None] + column[None, :], value, mask=mask)


@triton.jit
def gather_kernel(
    sources, outs, index, firsts, strides, out_strides, leads, widths, samples, out_rows,
    BLOCKS_R: tl.constexpr, BLOCKS_C: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Copy one tile per program; consecutive ranges of programs belong to consecutive tensors.

    All tensors of a layer share one launch, because small ones (masks, positions) would cost mostly
    the time of their own launch. The loop over tensors is unrolled, since their dtypes differ.
    """
    # firsts 0 6 7 11: programs 0 to 5 copy the first tensor, 6 the second, 7 to 10 the third.
    program = tl.program_id(0)
    for t in tl.static_range(COUNT):
        if (program >= firsts[t]) & (program < firsts[t + 1]):
            copy_tile(
                sources[t], outs[t], index, program - firsts[t], samples, out_rows, widths[t],
                strides[t], out_strides[t], leads[t], BLOCKS_R[t], BLOCKS_C[t],
            )  # fmt: skip


class Copy(NamedTuple):
    """Source and destination of one tensor, both as (lead, batch, sequence, contiguous row)."""

    source: Tensor
    out: Tensor

    @property
    def block(self) -> tuple[int, int]:
        """Return (rows, columns) of a tile of about 8 KiB, so that each load has 16 bytes."""
        width, itemsize = self.out.shape[3], self.out.element_size()
        elements = max(1024, 8192 // itemsize)
        across = min(1024, triton.next_power_of_2(width))
        while across > 128 and width % across:  # a divisor leaves no lane idle
            across //= 2
        return max(1, min(1024, elements // across)), across

    @property
    def tiles(self) -> int:
        """Number of programs that this tensor needs."""
        rows = self.out.shape[0] * self.out.shape[1] * self.out.shape[2]
        down, across = self.block
        return triton.cdiv(rows, down) * triton.cdiv(self.out.shape[3], across)


def gather_rows(
    index: Tensor, tensors: list[Tensor], seqs: list[int], batches: list[int], limit: int | None
) -> list[Tensor]:
    """See :func:`tokencomp.kernels.gather_rows.naive`."""
    index = index.contiguous()
    outs: list[Tensor] = []
    jobs: list[Copy] = []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        shape = list(tensor.shape)
        shape[batch], shape[seq] = index.shape
        outs.append(tensor.new_empty(shape))
        if outs[-1].numel():
            jobs += prepare(tensor, outs[-1], seq, batch)
    for first in range(0, len(jobs), MAX_TENSORS):
        launch(jobs[first : first + MAX_TENSORS], index)
    return outs


def prepare(tensor: Tensor, out: Tensor, seq: int, batch: int) -> list[Copy]:
    """Return four-dimensional views of `tensor` and `out`.

    A tensor with several leading dimensions cannot be one strided view, so it gives several jobs.
    """
    last = max(seq, batch)
    leads = [d for d in range(last) if d not in (seq, batch)]
    if len(leads) > 1:
        first = leads[0]
        slices = zip(tensor.unbind(first), out.unbind(first), strict=True)
        dims = (seq - (seq > first), batch - (batch > first))
        return [job for source, part in slices for job in prepare(source, part, *dims)]
    order = [*leads, batch, seq, *range(last + 1, tensor.dim())]
    # A mask is copied as the bytes that it is stored in.
    if out.dtype == torch.bool:
        tensor, out = tensor.view(torch.uint8), out.view(torch.uint8)
    # (lead, B, N, row): what lies after both dimensions is one contiguous row.
    source, target = tensor.permute(order), out.permute(order)
    if not leads:
        source, target = source[None], target[None]
    if source.dim() == 3:
        source, target = source[..., None], target[..., None]
    source, target = source.flatten(3), target.flatten(3)
    if source.shape[3] > 1 and source.stride(3) != 1:
        source = source.contiguous()
    return [Copy(source.expand(-1, out.shape[batch], -1, -1), target)]


def launch(jobs: list[Copy], index: Tensor) -> None:
    """Run the kernel on at most ``MAX_TENSORS`` tensors."""
    firsts = (0, *itertools.accumulate(job.tiles for job in jobs))
    gather_kernel[(firsts[-1],)](
        tuple(job.source for job in jobs),
        tuple(job.out for job in jobs),
        index,
        firsts,
        tuple(job.source.stride()[:3] for job in jobs),
        tuple(job.out.stride()[:3] for job in jobs),
        tuple(job.out.shape[0] for job in jobs),
        tuple(job.out.shape[3] for job in jobs),
        *index.shape,
        BLOCKS_R=tuple(job.block[0] for job in jobs),
        BLOCKS_C=tuple(job.block[1] for job in jobs),
        COUNT=len(jobs),
        num_warps=4,
    )
