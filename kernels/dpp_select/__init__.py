"""Greedy selection by a determinantal point process: rows that are relevant and unlike."""

from collections.abc import Sequence

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.dpp_select import naive
from torch import Tensor


def dpp_select(
    unit: Tensor,
    k: int | Sequence[int],
    relevance: Tensor,
    *,
    spans: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    r"""Choose rows one by one so that the determinant of the kernel of the chosen ones grows most.

    .. math:: K_{ij} = r_i \; (x_i \cdot x_j) \; r_j

    within every span; ties go to the lower index. Rows that add less than 1e-6 of their own
    relevance, because the directions of the chosen ones span them, come last, by relevance.

    Parameters
    ----------
    unit
        Unit vectors ``(n, D)`` in fp32 or fp64, spans one after the other.
    k
        Number of rows to choose in every span (int) or in each (sequence).
    relevance
        Relevance r > 0 of every row, ``(n,)``.
    spans
        Rows per span, as an int for equal spans or as one length per span. None means one span.

    Returns
    -------
    Tensor
        Chosen rows of `unit`, ascending, int64 ``(Σ k,)``.

    Raises
    ------
    KernelError
        If `k` exceeds a span, the spans do not cover `unit`, or shapes and dtypes do not fit.

    Notes
    -----
    k steps of the incremental Cholesky factorisation (arXiv 1709.05135; CDPruner is arXiv
    2506.10967), ``2·k·L·(D + k/2)`` FLOPs and ``4·k·L`` bytes of memory per span of L rows. In the
    plain version spans with as many rows and choices take their steps together, without the host.
    The Triton version computes all products of the rows first, ``2·L²·D`` FLOPs and ``4·L²`` bytes,
    and takes all steps in one launch. Spans above 4096 rows, or with k²·L above 2³¹, run in plain
    PyTorch on the device.
    """
    checks.operand("unit", unit, "(n, D)", checks.WIDE_FLOATS)
    lengths, counts = checks.spans_and_counts(k, spans, len(unit))
    (relevance,) = checks.vectors(unit, relevance=(relevance, len(unit), unit.dtype))
    return _op(unit, counts, relevance, lengths)


def _check_values(unit: Tensor, counts: list[int], relevance: Tensor, _: list[int]) -> None:
    good = unit.sum().isfinite() & (relevance.isfinite() & (relevance > 0)).all()
    checks.holds(good, "rows must be finite, and relevance finite and above 0")


_op = dispatch.Op(naive.dpp_select, checks.fake_choice, _check_values)
