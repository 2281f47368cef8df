"""Greedy max-min selection of rows that are diverse and, with weights, relevant."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from tokencomp.kernels.bipartite_match import normalise
from tokencomp.kernels.maxmin_select.rounds import EPSILON, GRAM_ELEMENTS, TAKEN, TIED, Rounds
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError

# Spans of up to this many rows compute all their cosines at once, equal spans as a batch.
MAX_GRAM_ROWS = 512


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
    trusted: bool = False,
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
    trusted
        Whether the caller knows that all arguments are right, and finite. Then `k` and `spans` are
        lists, weights, bonuses and margins fp32, and nothing is checked.

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
    themselves, so that two copies of a row have the distance 0 and no rounding error. On CPUs it is
    a matrix product in fp64.

    Related methods are farthest-point sampling, lazy greedy selection (bounds that only fall) and
    DivPrune (arXiv 2503.02175). The weighted rule and the rounds are ours.
    """
    isolated, first = isinstance(start, str), None if isinstance(start, str) else start
    if trusted:
        counts, lengths = cast("list[int]", k), cast("list[int]", spans)
    else:
        checks.operand("x", x, "(n, D)")
        if metric not in METRICS:
            raise KernelError(f"metric={metric!r} is not known; allowed: {', '.join(METRICS)}")
        lengths, counts = checks.spans_and_counts(k, spans, len(x))
        if isolated and start != "isolated":
            raise KernelError(f"start={start!r} is not known; allowed: isolated")
        if given is not None and first is None:
            raise KernelError("given counts first choices; name them with `start`")
        weights, bonus, margin, first, given = checks.vectors(
            x,
            weights=(weights, len(x), torch.float32),
            bonus=(bonus, len(x), torch.float32),
            margin=(margin, len(lengths), torch.float32),
            start=(first, len(lengths) if given is None else sum(counts), torch.int64),
            given=(given, len(lengths), torch.int64),
        )
    arguments = x, counts, weights, lengths, margin, first, metric, isolated, bonus, given
    chosen = _op(*arguments, trusted=trusted)
    return chosen if ordered else chosen.sort().values


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
        start, length = read_starts(start, given, counts), length.repeat_interleave(count)
    checks.holds(((start >= 0) & (start < length)).all(), "start must lie inside its span")


class Cosine:
    """Distances 1 - cos, at least EPSILON, of rows that are unit vectors."""

    prepare = staticmethod(normalise)

    @staticmethod
    def pairs(a: Tensor, b: Tensor) -> Tensor:
        """Distances of every row of `a` ``(…, n, D)`` from every row of `b` ``(…, m, D)``."""
        return (a @ b.mT).neg_().add_(1).clamp_(min=EPSILON)

    @staticmethod
    def closest(a: Tensor, b: Tensor) -> Tensor:
        """Distance of every row of `a` ``(n, D)`` from the closest row of `b` ``(m, D)``."""
        return (a @ b.T).amax(1).neg_().add_(1).clamp_(min=EPSILON)


class RootMeanSquare:
    """Root mean squares of the differences of rows, fp32.

    A matrix product subtracts squared norms from each other, and what remains for two copies of a
    row is their rounding error: in fp32 1e-3 of their length, so the differences themselves are
    squared. On CPUs the product is faster also in fp64, where the error is 6e-8 of the length: less
    than `EPSILON` for rows with a root mean square of up to 150. There a prepared row is
    (x, |x|²)/√D, fp64: the squared norms of all rows are computed once.
    """

    @staticmethod
    def prepare(x: Tensor) -> Tensor:
        """Rows ``(…, n, D)`` as the methods below take them, on CPUs ``(…, n, D + 1)``."""
        if x.device.type != "cpu":
            return x
        rows = x.double() / max(1, x.shape[-1]) ** 0.5
        return torch.cat([rows, rows.square().sum(-1, keepdim=True)], -1)

    @staticmethod
    def pairs(a: Tensor, b: Tensor) -> Tensor:
        """See `Cosine.pairs`."""
        if a.device.type == "cpu":
            return _rounded(_partial(a, b) + a[..., -1:])
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return (distance / max(1, a.shape[-1]) ** 0.5).clamp_(min=EPSILON)

    @classmethod
    def closest(cls, a: Tensor, b: Tensor) -> Tensor:
        """See `Cosine.closest`."""
        if a.device.type == "cpu":
            return _rounded(_partial(a, b).amin(1) + a[:, -1])
        return cls.pairs(a, b).amin(1)


def _partial(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|² - |a|² = |b|² - 2a·b of prepared rows, ``(…, n, m)``."""
    return (a[..., :-1] @ b[..., :-1].mT).mul_(-2).add_(b[..., None, :, -1])


def _rounded(squares: Tensor) -> Tensor:
    return squares.clamp_(min=0).sqrt_().float().clamp_(min=EPSILON)


Metric = type[Cosine] | type[RootMeanSquare]
METRICS: dict[str, Metric] = {"cosine": Cosine, "rms": RootMeanSquare}


def first_best(scores: Tensor) -> Tensor:
    """Index of the first of the scores ``(…, n)`` that tie with the best, ``(…)``."""
    best = scores.amax(-1, keepdim=True)
    return (scores >= torch.minimum(best, best * TIED)).int().argmax(-1)


def naive(
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
) -> Tensor:
    """Return the chosen rows of `x` in the order of their choice, spans one after the other.

    Spans with the same length and the same number of choices run as a batch. The arguments are
    those of :func:`tokencomp.kernels.maxmin_select` with one entry of `counts` and `lengths` per
    span.
    """
    first_row, first_pick = ([*accumulate(n, initial=0)] for n in (lengths, counts))
    if start is not None and given is not None:
        start = read_starts(start, given, counts)
    chosen: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=x.device)] * len(lengths)
    shapes = [*zip(lengths, counts, strict=True)]
    # Frames of a video have one shape and take their steps together, one batch per shape.
    for length, count in dict.fromkeys(shapes):
        spans = [span for span, shape in enumerate(shapes) if shape == (length, count)]
        size = max(1, GRAM_ELEMENTS // max(1, length * length))
        for begin in range(0, len(spans) if count else 0, size):
            members = spans[begin : begin + size]
            # Rows of every span of the batch: (members, length).
            rows = torch.tensor([first_row[s] for s in members], device=x.device)[:, None]
            rows = rows + torch.arange(length, device=x.device)
            weight = None if weights is None else weights[rows]
            extra = None if bonus is None else bonus[rows]
            member_index = torch.tensor(members, device=x.device)
            first = None
            if start is not None and given is None:
                # One first choice per span: (members, 1).
                first = FirstRows(start[member_index][:, None])
            elif start is not None and given is not None:
                # Several: as many entries as choices, (members, count); the first `given` are read.
                places = torch.tensor([first_pick[s] for s in members], device=x.device)[:, None]
                own = start[places + torch.arange(count, device=x.device)]
                first = FirstRows(own, given[member_index])
            margins = x.new_zeros(len(members)) if margin is None else margin[member_index]
            order = _greedy(x[rows], count, weight, margins, first, metric, isolated, extra)
            for member, picks in zip(members, rows.gather(1, order), strict=True):
                chosen[member] = picks
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=x.device)


def read_starts(start: Tensor, given: Tensor, counts: list[int]) -> Tensor:
    """First choices ``(Σ counts,)`` with 0 after the `given` ones of every span."""
    # counts 3 and 2, given 1 and 2: places 0 1 2 | 0 1, and entries a - - | b c become a 0 0 | b c.
    place = torch.cat([torch.arange(count) for count in counts] or [torch.arange(0)])
    count = torch.tensor(counts, device=start.device)
    return start.masked_fill(place.to(start.device) >= given.repeat_interleave(count), 0)


class FirstRows(NamedTuple):
    """First choices of spans: rows ``(S, m)``, and how many of them count, ``(S,)``; None: all."""

    rows: Tensor
    given: Tensor | None = None

    def of_span(self, span: int) -> Tensor:
        """The first choices of one span."""
        return self.rows[span] if self.given is None else self.rows[span, : int(self.given[span])]


def _greedy(
    x: Tensor,
    count: int,
    weight: Tensor | None,
    margin: Tensor,
    first: FirstRows | None,
    metric: str,
    isolated: bool,
    bonus: Tensor | None,
) -> Tensor:
    """Choose `count` rows of every span ``(L, D)`` in `x` ``(S, L, D)``; result ``(S, count)``.

    `weight` and `bonus` are ``(S, L)``, `margin` is ``(S,)``.
    """
    measure = METRICS[metric]
    # bf16 rows are compared in fp32: the 8 bits of bf16 are too few to rank distances.
    x = x if x.dtype == torch.float64 else x.float()
    rows = measure.prepare(x)
    short = x.shape[1] <= MAX_GRAM_ROWS
    distance = measure.pairs(rows, rows) if short else None
    if isolated:
        first = FirstRows(isolated_row(rows, measure, distance)[:, None])
    elif first is None:
        if bonus is not None:
            start = first_best(bonus)
        elif weight is not None:
            start = weight.argmax(1)
        elif measure is Cosine:
            mean = normalise(x.mean(1, keepdim=True))
            start = first_best(1 - (rows @ mean.mT).squeeze(2))
        else:
            start = first_best((x - x.mean(1, keepdim=True)).square().sum(2))
        first = FirstRows(start[:, None])
    weight = x.new_ones(x.shape[:2]) if weight is None else weight.to(x.dtype)
    bonus = torch.zeros_like(weight) if bonus is None else bonus.to(x.dtype)
    margin = margin.to(x.dtype)
    if distance is not None:
        return _at_once(distance, weight, margin, first, count, bonus)
    starts_of = [first.of_span(span) for span in range(len(rows))]
    spans = zip(rows, weight, margin, starts_of, bonus, strict=True)
    return torch.stack([Rounds(*span, count, measure).run() for span in spans])


def isolated_row(rows: Tensor, measure: Metric, distance: Tensor | None) -> Tensor:
    """The row of every span ``(L, D)`` of `rows` whose nearest other row is farthest, ``(S,)``.

    `distance` ``(S, L, L)`` loses its diagonals, which no later step reads.
    """
    if distance is not None:
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return first_best(distance.amin(2))
    # A span without a matrix: blocks of rows against all rows, (S, step, L) each.
    length = rows.shape[1]
    nearest = []
    for begin in range(0, length, step := max(1, GRAM_ELEMENTS // (length * len(rows)))):
        part = measure.pairs(rows[:, begin : begin + step], rows)
        at = torch.arange(part.shape[1], device=rows.device)
        # A row is no neighbour of itself; copies of it are.
        part[:, at, at + begin] = torch.inf
        nearest.append(part.amin(2))
    return first_best(torch.cat(nearest, dim=1))


def _at_once(
    distance: Tensor, weight: Tensor, margin: Tensor, first: FirstRows, count: int, bonus: Tensor
) -> Tensor:
    """Take each step for all spans at once, from the distances ``(S, L, L)`` of their rows.

    The steps run on the host in NumPy. They are many short operations, so their start-up cost
    dominates, and NumPy's is the lowest.
    """
    distances = distance.cpu().numpy()
    # Copies, as the steps mark chosen rows in them.
    weights, margins = weight.cpu().numpy().copy(), margin.cpu().numpy()[:, None]
    extra, starts_of = bonus.cpu().numpy().copy(), first.rows.cpu().numpy()
    given = None if first.given is None else first.given.cpu().numpy()
    most = 1 if given is None else int(given.max())
    last, spans = starts_of[:, 0], np.arange(len(distances))
    nearest, scores = np.full_like(weights, np.inf), np.empty_like(weights)
    order = np.empty((count, len(distances)), dtype=np.int64)
    with np.errstate(over="ignore"):
        for step in range(count):
            order[step] = last
            weights[spans, last], extra[spans, last] = TAKEN, 0.0
            # Row `last` of every matrix, (S, L): the step reads L values per span, not L².
            np.minimum(nearest, distances[spans, last], out=nearest)
            np.multiply(np.add(nearest, margins, out=scores), weights, out=scores)
            np.add(scores, extra, out=scores)
            last = (scores >= scores.max(1, keepdims=True) * TIED).argmax(1)  # the first of them
            if given is not None and step + 1 < most:
                # Spans with fewer first choices than others choose by score already.
                last = np.where(step + 1 < given, starts_of[:, step + 1], last)
    return torch.from_numpy(order.T.copy()).to(distance.device)


_op = dispatch.Op("maxmin_select", naive, checks.fake_choice, _check_values)
