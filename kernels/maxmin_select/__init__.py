"""Greedy max-min selection of rows that are diverse and, with weights, relevant."""

from collections.abc import Sequence
from typing import Literal

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.maxmin_select import naive
from torch import Tensor


def maxmin_select(
    x: Tensor,
    k: int | Sequence[int],
    weights: Tensor | None = None,
    *,
    spans: int | Sequence[int] | Tensor | None = None,
    margin: Tensor | None = None,
    start: Tensor | Literal["isolated"] | None = None,
    metric: str = "cosine",
    ordered: bool = False,
    bonus: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    r"""Choose rows one by one, each as far as possible from those chosen before.

    .. math:: next = \arg\max_i \; w_i \cdot (\mu + \min_{j \in chosen} d(x_i, x_j)) + b_i

    within every span; ties go to the lower index, and scores that differ by less than a share of
    4e-6 are ties: of two rows each is as far from the other, and rounding must not decide.
    Distances below 1e-5 count as 1e-5, because the distance between copies of a row is mere
    rounding. Among copies, the weight therefore decides.

    Parameters
    ----------
    x
        Features ``(n, D)``, spans one after the other.
    k
        Number of rows to choose in every span (int) or in each (sequence), from 0 to the rows of
        the span.
    weights
        Relevance w ≥ 0 of every row, ``(n,)``. None means 1 for every row. A caller that wants a
        power of the relevance computes it beforehand.
    spans
        Rows per span, as an int for equal spans or as one length per span. None means one span.
    margin
        μ ≥ 0 of every span, ``(spans,)``, which is added to all of its distances. Among distances
        that are small compared with μ, the weights decide. None means 0. Without weights the margin
        has no effect.
    start
        First choice of every span, int ``(spans,)``, counted within the span. None means the row
        with the largest bonus, without one that with the largest weight, and without weights the
        row farthest from the span's mean; ``"isolated"`` the row whose nearest other row is
        farthest (DivPrune). With `given`, several first choices, int ``(Σ k,)``.
    metric
        The distance d: ``"cosine"``, 1 - cos, or ``"rms"``, the root mean square of the
        differences, √(|x_i - x_j|² / D). The second keeps what the lengths of rows say, which
        matters for pixels: a dark cell and a bright one may have one direction.
    ordered
        Whether the rows come in the order of their choice, span by span: the first m rows of a
        span are then what ``k=m`` chooses.
    bonus
        b ≥ 0 of every row, ``(n,)``, which is added to its score. None means 0.
    given
        How many first choices every span has in `start`, int ``(spans,)``, from 1 to its `k`. Of
        the k entries of a span later ones are not read, so that the number may depend on data.

    Returns
    -------
    Tensor
        Chosen rows of `x`, ascending, int64 ``(Σ k,)``.

    Raises
    ------
    KernelError
        If `k` exceeds a span, the spans do not cover `x`, weights, margins or bonuses are negative
        or not finite, a start is outside its span, the metric is not known, or features are NaN or
        infinite.

    Notes
    -----
    A span of L rows, up to 512 (Triton: 8192), computes all distances once with ``2·L²·D`` FLOPs
    and then takes k steps that read L values each: ``L·D·itemsize + 4·L² + 4·k·L`` bytes. The
    Triton version takes the steps on the device without the host; the plain version takes them on
    the host.

    A longer span does not store L² distances. It proceeds in rounds among the c best rows, and its
    result is still exact: scores never rise, so the best candidate is the best row of all as long
    as its score is above the score that the best other row had when the round began, by more than a
    tie. The score of
    another row from an earlier round remains an upper bound, and is computed anew only when it is
    among the best. With c = 256, r rounds take at most ``2·(k·L + r·c²)·D`` FLOPs; in videos, still
    or moving, about half of the first part is needed. The Triton version has c = 2048 and updates
    all rows once per round: it takes all of these FLOPs and ``r·(L·D·itemsize + 4·c²) + 4·k·c``
    bytes. A round makes tens to hundreds of choices, fewer where rows have many copies. The host
    waits for the device after each round, so a CUDA graph cannot capture such a call.

    The root mean square takes as many FLOPs, but not on tensor cores: it squares the differences
    themselves, so that two copies of a row have the distance 0 and no rounding error.

    Related methods are farthest-point sampling, lazy greedy selection (bounds that only fall) and
    DivPrune (arXiv 2503.02175). The weighted rule and the rounds are ours.
    """
    checks.operand("x", x, "(n, D)")
    if metric not in naive.METRICS:
        raise KernelError(f"metric={metric!r} is not known; allowed: {', '.join(naive.METRICS)}")
    lengths, counts = checks.spans_and_counts(k, spans, len(x))
    isolated = isinstance(start, str)
    if isinstance(start, str):
        if start != "isolated":
            raise KernelError(f"start={start!r} is not known; allowed: isolated")
        start = None
    if given is not None and start is None:
        raise KernelError("given counts first choices; name them with `start`")
    weights, bonus, margin, start, given = checks.vectors(
        x,
        weights=(weights, len(x), torch.float32),
        bonus=(bonus, len(x), torch.float32),
        margin=(margin, len(lengths), torch.float32),
        start=(start, len(lengths) if given is None else sum(counts), torch.int64),
        given=(given, len(lengths), torch.int64),
    )
    chosen = _op(x, counts, weights, lengths, margin, start, metric, isolated, bonus, given)
    return chosen if ordered else chosen.sort().values


def mean_distance(x: Tensor, *, spans: Sequence[int] | None = None) -> Tensor:
    """Compute the mean distance (1 - cos) of :func:`maxmin_select` over all pairs of rows.

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
    return _mean_op(x, checks.lengths_of("spans", spans, len(x)))


_mean_op = dispatch.Op(
    "mean_distance",
    naive.mean_distance,
    lambda x, lengths: x.new_empty(len(lengths), dtype=torch.promote_types(x.dtype, torch.float32)),
    module="triton_rows",
)


def _check_values(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    margin: Tensor | None,
    start: Tensor | None,
    metric: str,
    isolated: bool,
    bonus: Tensor | None,
    given: Tensor | None,
) -> None:
    """Require finite features, finite factors >= 0, and first choices inside their spans."""
    # A sum is finite only if no element is NaN or infinite. Model features are far too small for
    # an fp32 sum to overflow by itself.
    checks.holds(x.sum(dtype=torch.float32).isfinite(), "x has NaN or infinite features")
    good = [(t.isfinite() & (t >= 0)).all() for t in (weights, margin, bonus) if t is not None]
    if good:
        checks.holds(
            torch.stack(good).all(), "weights, margins and bonuses must be finite and at least 0"
        )
    if start is None:
        return
    length = checks.table(lengths, x.device, torch.int64)
    if given is not None:
        count = checks.table(counts, x.device, torch.int64)
        checks.holds(
            ((given <= count) & (given >= count.clamp(max=1))).all(), "given must be from 1 to k"
        )
        start, length = naive.read_starts(start, given, counts), length.repeat_interleave(count)
    checks.holds(((start >= 0) & (start < length)).all(), "start must lie inside its span")


_op = dispatch.Op("maxmin_select", naive.maxmin_select, checks.fake_choice, _check_values)
