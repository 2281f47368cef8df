"""Size-weighted means of the rows that merge into a kept row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError


class MergedRows(NamedTuple):
    """Result of :func:`merge_rows`.

    `x` is ``(k, D)`` in the input dtype, and `sizes` is ``(k,)`` in fp32 (fp64 for fp64 features).
    """

    x: Tensor
    sizes: Tensor


def merge_rows(
    x: Tensor,
    target: Tensor,
    keep: Tensor,
    sizes: Tensor | None = None,
    *,
    frames: int | Sequence[int] | Tensor | None = None,
    weighted: bool = True,
    trusted: bool = False,
) -> MergedRows:
    r"""Compute the mean of every kept row and the rows that merge into it.

    .. math:: out_j = \sum_{i : target_i = keep_j} w_i x_i \; / \sum_{i : target_i = keep_j} w_i

    where w are the sizes (how many tokens are already merged into a row), or 1 if not `weighted`.

    Parameters
    ----------
    x
        Features ``(n, D)``.
    target
        The row of `x` that row i merges into, int ``(n,)``: the row itself for a kept row, -1 for
        a row that is dropped.
    keep
        Kept rows in ascending order, int ``(k,)``, with ``target[keep] == keep``.
    sizes
        Number of tokens that each row stands for, ``(n,)``, above 0. None means 1 for every row.
    frames
        Tokens per frame, as an int or as one length per frame. The caller promises that rows merge
        only within their frame, so that the GPU kernel searches for members there alone. None means
        that rows may merge with any row.
    weighted
        Whether means are weighted by `sizes` (ToMe, arXiv 2210.09461) or plain (AIM,
        arXiv 2412.03248).
    trusted
        Whether the caller knows that all arguments are right, with int64 rows and fp32 sizes (fp64
        for fp64 features). Nothing is checked then, and the host need not wait for the device to
        look at rows.

    Returns
    -------
    MergedRows
        Merged rows, and new sizes (always sums).

    Raises
    ------
    KernelError
        If shapes do not fit, a target is not a kept row, or `keep` is not ascending.

    Notes
    -----
    The cost is ``2·n·D`` FLOPs and ``(n + k)·D·itemsize`` bytes plus indices: every row is read
    once and every kept row is written once. Sums are taken in fp32 and in row order without
    atomics, so the result is deterministic. The function is differentiable in `x`: if a gradient is
    needed, PyTorch runs instead of the Triton kernel.
    """
    rows = len(x)
    if not trusted:
        checks.operand("x", x, "(n, D)")
        target, keep, sizes = checks.vectors(
            x,
            target=(target, rows, torch.int64),
            keep=(keep, keep.numel(), torch.int64),
            sizes=(sizes, rows, torch.float64 if x.dtype == torch.float64 else torch.float32),
        )
        if len(keep) > rows:
            raise KernelError(f"{len(keep)} rows to keep of {rows}")
    lengths = [] if frames is None else checks.lengths_of("frames", frames, rows)
    return MergedRows(*_op(x, target, keep, sizes, weighted, lengths, trusted=trusted))


def _check_values(x: Tensor, target: Tensor, keep: Tensor, *_: object) -> None:
    """Require `keep` to be ascending and in range, and every target to be a kept row or -1."""
    rows = len(target)
    kept = torch.zeros(rows + 1, dtype=torch.bool, device=target.device)
    kept[-1] = True  # a target of -1 reads this extra entry
    inside = ((keep >= 0) & (keep < rows)).all() & ((target >= -1) & (target < rows)).all()
    safe = keep.clamp(0, max(rows - 1, 0))
    if rows:
        kept[safe] = True
    good = inside & (keep.diff() > 0).all() & kept[target.clamp(-1, rows - 1)].all()
    good &= (target[safe] == keep).all()
    checks.holds(
        good,
        f"keep must be ascending rows in [0, {rows}) with target[keep] == keep, and every target "
        "a kept row or -1",
    )


def naive(
    x: Tensor,
    target: Tensor,
    keep: Tensor,
    sizes: Tensor | None,
    weighted: bool,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Add rows to the kept rows in row order, so that sums do not depend on scheduling.

    Shapes are those of :func:`tokencomp.kernels.merge_rows`; the `lengths` of the frames narrow the
    search of the Triton form only.
    """
    count = len(keep)
    # 5 rows, keep 1 and 3, target 1 1 3 3 -1:
    #     slot of rows, and of -1      -1  0 -1  1 -1 | -1
    #     slot of targets               0  0  1  1 -1        row 4 is dropped
    slot = torch.full((len(x) + 1,), -1, dtype=torch.int64, device=x.device)
    slot[keep] = torch.arange(count, device=x.device)
    slot = slot[target]  # a target of -1 reads the extra last entry, which means dropped
    members = (slot >= 0).nonzero().squeeze(1)
    slot = slot[members]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    ones = torch.ones(len(members), dtype=dtype, device=x.device)
    size = ones if sizes is None else sizes[members].to(dtype)
    weight = size if weighted else ones
    total = x.new_zeros(count, dtype=dtype).index_add(0, slot, weight)
    merged = x.new_zeros(count, x.shape[1], dtype=dtype)
    merged = merged.index_add(0, slot, x[members].to(dtype) * weight[:, None]) / total[:, None]
    # Plain means still count all tokens that they represent.
    new_sizes = total if weighted else total.new_zeros(count).index_add(0, slot, size)
    return merged.to(x.dtype), new_sizes


_op = dispatch.Op(
    "merge_rows",
    naive,
    lambda x, target, keep, *_: (
        x.new_empty(len(keep), x.shape[1]),
        x.new_empty(len(keep), dtype=torch.promote_types(x.dtype, torch.float32)),
    ),
    _check_values,
    differentiable=True,
)
