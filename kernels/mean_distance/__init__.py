"""The mean cosine distance of all pairs of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch

# Number of elements that are in fp32 at once (64 MiB).
BLOCK_ELEMENTS = 1 << 24


def mean_distance(x: Tensor, *, spans: Sequence[int] | None = None) -> Tensor:
    """Compute the mean distance (1 - cos) over all pairs of rows.

    Parameters
    ----------
    x
        Features ``(n, D)``, of any floating dtype.
    spans
        Rows per span. None means one span.

    Returns
    -------
    Tensor
        ``(spans,)`` in fp32 (fp64 for fp64 features), from 0 to 1.

    Raises
    ------
    KernelError
        If `x` is not ``(n, D)`` or not floating, or the spans do not cover it.

    Notes
    -----
    The mean over all pairs, a row with itself included, is 1 - |mean unit vector|². It therefore
    takes one pass over the rows.
    """
    checks.operand("x", x, "(n, D)")
    return _op(x, checks.lengths_of("spans", spans, len(x)))


def naive(x: Tensor, lengths: list[int]) -> Tensor:
    """Mean distances of all spans, one after the other; `x` is ``(n, D)``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not lengths:
        return x.new_zeros(0, dtype=dtype)
    return torch.cat([_mean_distance(span, dtype) for span in x.split(lengths)])


def _mean_distance(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean distance of one span, ``(1,)``."""
    # Σ_ij (1 - u_i · u_j) / n² = 1 - |Σ_i u_i / n|²: no pair is computed.
    # Unit vectors (1, 0), (0, 1): mean (.5, .5), distance 1 - .5, the mean of 0 1 1 0.
    total = x.new_zeros(x.shape[1], dtype=dtype)
    for part in x.split(max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))):
        rows = part.to(dtype)
        norm = rows.norm(dim=1)
        inverse = 1 / norm.clamp(min=torch.finfo(dtype).tiny)
        total = total + inverse @ rows
    return (1 - (total / max(1, len(x))).square().sum(0, keepdim=True)).clamp_(min=0)


_op = dispatch.Op(
    "mean_distance",
    naive,
    lambda x, lengths: x.new_empty(len(lengths), dtype=torch.promote_types(x.dtype, torch.float32)),
)
