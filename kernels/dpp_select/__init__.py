"""Greedy selection by a determinantal point process: rows that are relevant and unlike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch

# A row that adds less than this share of its own relevance lies in the span of the chosen ones.
EPSILON = 1e-6


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


def naive(unit: Tensor, counts: list[int], relevance: Tensor, lengths: list[int]) -> Tensor:
    """Return the chosen rows in ascending order; equal spans take their steps as a batch."""
    first = checks.starts(lengths)
    chosen = [torch.empty(0, dtype=torch.int64, device=unit.device)]
    shapes = [*zip(lengths, counts, strict=True)]
    for length, count in dict.fromkeys(shapes):
        if not count:
            continue
        spans = [span for span, shape in enumerate(shapes) if shape == (length, count)]
        rows = torch.tensor([first[s] for s in spans], device=unit.device)[:, None]
        rows = rows + torch.arange(length, device=unit.device)
        order = _greedy(unit[rows], relevance[rows], count)
        chosen.append(rows.gather(1, order).flatten())
    return torch.cat(chosen).sort().values


# Three rows of relevance 1, which span a plane: a = (1, 0), b = (.8, .6), c = (0, 1).
#     gain                      1     1     1       a is chosen, the first of equals
#     factor of a, K_a / √1     1    .8     0
#     gain - factor²            0   .36     1       what a does not explain: c is chosen
#     factor of c               0    .6     1       (K_c - products with earlier factors) / √1
#     gain - factor²            0     0     0       b is used up: it adds no determinant
# The determinant of the chosen rows is the product of their gains when they were chosen.
def _greedy(unit: Tensor, r: Tensor, count: int) -> Tensor:
    """Choose `count` rows of every span of unit ``(S, L, D)``, r ``(S, L)``; ``(S, count)``."""
    spans, length = r.shape
    gain, least = r * r, EPSILON * r * r
    # Rows of the Cholesky factor, one per choice: (S, count, L).
    factors = unit.new_zeros(spans, count, length)
    chosen = torch.empty(spans, count, dtype=torch.int64, device=unit.device)
    taken = torch.zeros_like(r, dtype=torch.bool)
    for i in range(count):
        # Directions that are used up rank below all others, whose gains are positive: -1 / r is
        # negative for every r > 0, and grows with r.
        score = torch.where(gain > least, gain, -1.0 / r).masked_fill(taken, -torch.inf)
        best = score.argmax(1, keepdim=True)
        chosen[:, i] = best[:, 0]
        taken.scatter_(1, best, True)
        # Relevance and gain of the new choice, (S, 1) each.
        own, left = r.gather(1, best), gain.gather(1, best)
        row = unit.gather(1, best[..., None].expand(-1, -1, unit.shape[2]))
        cosine = (unit @ row.mT)[..., 0]
        before = factors[:, :i].gather(2, best[:, None].expand(-1, i, -1))
        # Row of K minus what the earlier factors explain of it, (S, L).
        row = own * r * cosine - (before.mT @ factors[:, :i])[:, 0]
        # The gain of a choice that is used up is rounding, which the division would amplify.
        fresh = left > EPSILON * own**2
        factors[:, i] = torch.where(fresh, row / left.clamp(min=1e-20).sqrt(), 0.0)
        gain = gain - factors[:, i] ** 2
    return chosen


_op = dispatch.Op("dpp_select", naive, checks.fake_choice, _check_values)
