"""Triton version of ``mean_distance``: inverse norms, then the mean of the unit rows."""

import torch
from tokencomp.kernels.maxmin_select.triton_rows import inverse_norms, means
from tokencomp.kernels.mean_distance import naive
from torch import Tensor

from tokencomp.kernels import checks


def mean_distance(x: Tensor, lengths: list[int]) -> Tensor:
    """See :func:`tokencomp.kernels.mean_distance.naive`."""
    if x.dtype == torch.float64:
        return naive(x, lengths)
    x = checks.rows_contiguous(x)
    inverse, _ = inverse_norms(x, lengths)
    return (1 - means(x, inverse, lengths).square().sum(1)).clamp_(min=0)
