"""Greedy max-min selection of diverse (and relevant) rows."""

from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch, segments
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.maxmin_select import naive
from torch import Tensor


def maxmin_select(
    x: Tensor,
    k: int | Sequence[int],
    weights: Tensor | None = None,
    *,
    spans: int | Sequence[int] | Tensor | None = None,
    centred: bool = False,
    margin: Tensor | None = None,
    start: Tensor | None = None,
    ascending: bool = True,
) -> Tensor:
    r"""Choose rows one by one, each as far as possible from those chosen before.

    .. math:: next = \arg\max_i \; w_i \cdot (\mu + \min_{j \in chosen} (1 - \cos(x_i, x_j)))

    within every span; ties go to the lower index. Distances below 1e-5 count as 1e-5: what differs
    between copies of a row is rounding, so among copies the larger weight goes first.

    Parameters
    ----------
    x
        ``(n, D)`` features, spans one after the other.
    k
        Rows to choose in every span (int), or per span; 0 ≤ k ≤ rows of the span.
    weights
        ``(n,)`` relevance w ≥ 0 (raise it to a power beforehand). None: all 1.
    spans
        Rows per span (int), or one length per span. None: one span.
    centred
        Subtract the span's mean before the cosine.
    margin
        ``(spans,)`` μ ≥ 0, added to every distance of the span: weights decide among distances that
        are small beside it. None: 0. Without weights it changes nothing.
    start
        int ``(spans,)``, first row of every span, counted within the span. None: the largest
        weight; without weights the row with the lowest cosine to the span's mean.
    ascending
        Sort the result; otherwise rows come in the order chosen (so that the first m of a span
        are what ``k=m`` would have chosen).

    Returns
    -------
    Tensor
        int64 ``(Σ k,)`` rows of `x`, spans one after the other.

    Raises
    ------
    KernelError
        If `k` exceeds a span, spans do not cover `x`, weights or margins are negative or not
        finite, or features are NaN or infinite.

    Notes
    -----
    Spans of up to 512 rows (Triton: 8192): FLOPs ``2·L²·D`` (cosines, once), then k steps that
    read L values each; bytes ``L·D·itemsize + 4·L² + 4·k·L``. Triton takes them on the device
    without the host, the plain version on the host.

    Longer spans store no L² cosines. They go in rounds among the c best rows, exactly: scores never
    rise, so that candidates alone matter while their best is above what the best other row was when
    the round began. Other rows keep the score of an earlier round as a bound until it is among the
    best; most cosines are never needed. FLOPs of r rounds: ``2·(k·L + r·c²)·D`` at most, c = 256,
    and half of the first part in videos that stand still as in those that move. Triton takes
    c = 2048 and brings all rows up to date once a round: all of these FLOPs, and
    ``r·(L·D·itemsize + 4·c²) + 4·k·c`` bytes. Rounds are of tens to hundreds of choices, fewer
    where rows have many copies; after each the host waits for the device, so CUDA graphs cannot
    hold such a call.

    Kin: farthest-point sampling; lazy greedy (bounds that only fall); DivPrune (arXiv 2503.02175).
    The weighted rule and the rounds are ours.
    """
    checks.shape("x", x, 2, "(n, D)")
    checks.floating("x", x)
    checks.int32_sizes(n=len(x))
    lengths = segments.lengths_of("spans", spans, len(x))
    counts = [k] * len(lengths) if isinstance(k, int) else [int(c) for c in k]
    if len(counts) != len(lengths):
        raise KernelError(f"{len(counts)} values of k for {len(lengths)} spans")
    for count, length in zip(counts, lengths, strict=True):
        checks.count("k", count, 0, length)
    checks.same_device(x=x, weights=weights, margin=margin, start=start)
    if weights is not None:
        if weights.shape != (len(x),):
            raise KernelError(f"weights must be ({len(x)},); got {tuple(weights.shape)}")
        weights = weights.detach().float().contiguous()
    if margin is not None:
        if margin.shape != (len(lengths),):
            raise KernelError(f"margin must be ({len(lengths)},); got {tuple(margin.shape)}")
        margin = margin.detach().float().contiguous()
    if start is not None:
        checks.integer("start", start)
        if start.shape != (len(lengths),):
            raise KernelError(f"start must be ({len(lengths)},); got {tuple(start.shape)}")
        start = start.long().contiguous()
    chosen = _op(x.detach(), counts, weights, lengths, centred, margin, start)
    return chosen.sort().values if ascending else chosen


def mean_distance(x: Tensor, centred: bool = False) -> Tensor:
    """Mean of :func:`maxmin_select`'s distance (1 - cos) over all pairs of rows.

    Parameters
    ----------
    x
        ``(n, D)`` features of one span, any floating dtype.
    centred
        As there.

    Returns
    -------
    Tensor
        ``(1,)`` fp32 (fp64 for fp64) in [0, 1]: 1 - |mean unit vector|², a row's distance to itself
        included. One pass over the rows (centred: two), a block of them widened at a time.
    """
    checks.shape("x", x, 2, "(n, D)")
    checks.floating("x", x)
    with dispatch.no_autocast(x):
        return naive.mean_distance(x.detach(), centred)


@dispatch.custom_op("maxmin_select")
def _op(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
    margin: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    _check_values(x, weights, lengths, margin, start)
    if dispatch.which(x) == "naive":
        return naive.maxmin_select(x, counts, weights, lengths, centred, margin, start)
    from tokencomp.kernels.maxmin_select import triton

    checks.triton_dtype("x", x)
    x = checks.rows_contiguous(x)
    with dispatch.on_device(x):
        return triton.maxmin_select(x, counts, weights, lengths, centred, margin, start)


@_op.register_fake
def _(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
    margin: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    return x.new_empty(sum(counts), dtype=torch.int64)


def _check_values(
    x: Tensor,
    weights: Tensor | None,
    lengths: list[int],
    margin: Tensor | None,
    start: Tensor | None,
) -> None:
    """Finite features, finite weights and margins >= 0, starts inside their spans."""
    if not dispatch.checks_enabled(x):
        return
    # A sum is finite only if no element is NaN or infinite (fp32 sums of model features).
    checks.holds(x.sum(dtype=torch.float32).isfinite(), "x has NaN or infinite features")
    given = [t for t in (weights, margin) if t is not None]
    if given:
        good = torch.stack([(t.isfinite() & (t >= 0)).all() for t in given]).all()
        checks.holds(good, "weights and margins must be finite and at least 0")
    if start is not None:
        length = segments.table(lengths, x.device, torch.int64)
        checks.holds(((start >= 0) & (start < length)).all(), "start must lie inside its span")
