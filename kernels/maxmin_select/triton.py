"""Triton version of ``maxmin_select``.

For spans of up to ``MAX_GRAM_ROWS`` rows, one launch computes all distances, cosines with tensor
cores. A second launch has one program per span, which takes all steps on the device and reads one
row of distances per step. Longer spans do the same among the best ``CANDIDATES`` rows, in rounds as
in the plain version: every round reads all rows once, and the host waits once per round for the
number of choices.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from tokencomp.kernels.maxmin_select.rounds import TAKEN, TIED
from tokencomp.kernels.maxmin_select.triton_distances import Cosines, Differences, Rows, pitch
from tokencomp.kernels.maxmin_select.triton_rows import first_choice, inverse_norms
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.checks import starts, table
from tokencomp.kernels.tile import padded

MAX_GRAM_ROWS = 8192
# Number of candidates in a round of a longer span; a round may choose all of them.
CANDIDATES = 2048
# Number of distances that are in memory at once (256 MiB in fp32).
GRAM_ELEMENTS = 1 << 26


@triton.jit
def isolated_kernel(gram, first_row, first_gram, nearest, BLOCK: tl.constexpr):
    """Find the distance of one row from the nearest other row of its span.

    The grid is (rows of the longest span, spans).
    """
    span = tl.program_id(1)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(0)
    if i < rows:
        # // 16 * 16 changes nothing, and shows the compiler an alignment that permits wide loads.
        gram += tl.load(first_gram + span) // 16 * 16 + i.to(tl.int64) * pitch(rows)
        closest = tl.full([BLOCK], float("inf"), tl.float32)
        for begin in range(0, rows, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            # The diagonal is left out by the mask: the matrix itself is read again by the steps.
            other = (j < rows) & (j != i)
            closest = tl.minimum(closest, tl.load(gram + j, mask=other, other=float("inf")))
        tl.store(nearest + start + i, tl.min(closest, axis=0))


@triton.jit
def greedy_kernel(
    gram, first_row, first_gram, first_pick, start_row, weights, picks,
    margins, bonuses, given, nearest, behind, below, steps_taken,
    WEIGHTED: tl.constexpr, MARGIN: tl.constexpr, BONUS: tl.constexpr, GIVEN: tl.constexpr,
    ROUND: tl.constexpr, BLOCK: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """Take all steps of one span in one program.

    Every step depends on the one before, so a span cannot be shared between programs. The distances
    from the choices stay in registers, and each step reads one row of `gram`, the distances of all
    pairs. With GIVEN, `start_row` has an entry per choice, of which the first `given` are used.

    With ROUND, the rows are the candidates of a round and `nearest` holds their distances from
    earlier choices. The loop ends when another row could come first: `behind` and `below` are the
    highest scores of the other rows, see :func:`tokencomp.kernels.maxmin_select.rounds._round`.
    `steps_taken` receives the number of steps.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    begin = tl.load(first_pick + span)
    count = tl.load(first_pick + span + 1) - begin
    gram += tl.load(first_gram + span) // 16 * 16
    row = tl.arange(0, BLOCK)
    inside = row < rows
    # (BLOCK,): distance of every row from the closest choice so far.
    distance = tl.full([BLOCK], float("inf"), tl.float32)
    if ROUND:
        distance = tl.load(nearest + row, mask=inside, other=0.0)
        highest_behind = tl.load(behind)
        highest_below = tl.load(below)
    # A negative weight marks rows that are chosen already or lie outside of the span.
    weight = tl.where(inside, 1.0, -1.0)
    if WEIGHTED:
        weight = tl.load(weights + start + row, mask=inside, other=-1.0)
    margin = 0.0
    if MARGIN:
        margin = tl.load(margins + span)
    bonus = 0.0
    if BONUS:
        bonus = tl.load(bonuses + start + row, mask=inside, other=0.0)
    # First choices: an entry for every choice of all spans (GIVEN), or one for every span.
    if GIVEN:
        start_row += begin
        ready = tl.load(given + span)
    else:
        start_row += span
        ready = 0
    last = tl.load(start_row, mask=count > 0, other=0).to(tl.int32)
    step = 0
    while step < count:
        tl.store(picks + begin + step, (start + last).to(tl.int64))
        weight = tl.where(row == last, -1.0, weight)
        # The mask reaches up to the pitch instead of the last row: a mask in units of 16 lets the
        # loads be wide. Entries in between are never chosen, because their weight is negative.
        at = gram + last.to(tl.int64) * pitch(rows) + row
        distance = tl.minimum(distance, tl.load(at, mask=row < pitch(rows), other=0.0))
        # Scores of free rows are at least 0, so -1 excludes all others from the maximum.
        score = tl.where(weight < 0.0, -1.0, (distance + margin) * weight + bonus)
        best = tl.max(score, axis=0)
        line = best * TIED
        last = tl.min(tl.where(score >= line, row, BLOCK), axis=0)  # the first of those that tie
        step += 1
        if GIVEN:
            # -1 after the last first choice: from there on the scores decide.
            named = tl.load(start_row + step, mask=step < ready, other=-1).to(tl.int32)
            last = tl.where(named < 0, last, named)
        if ROUND:
            # The step after the one just noted would be uncertain, so `count` ends the loop.
            over = (best < highest_behind) | (line <= highest_below)
            count = tl.where(over, step, count)
    if ROUND:
        tl.store(steps_taken, step)


def maxmin_select(
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
    """See :func:`tokencomp.kernels.maxmin_select.naive`."""
    checks.triton_dtype("x", x)
    x = checks.rows_contiguous(x)
    picks = torch.empty(sum(counts), dtype=torch.int64, device=x.device)
    if len(picks) == 0:
        return picks
    rms = metric == "rms"
    inverse, far = inverse_norms(x, lengths, rms)
    if start is None and bonus is not None:
        start = first_choice(bonus, lengths)
    elif start is None and not isolated:
        start = first_choice(far, lengths) if weights is None else first_choice(weights, lengths, 1)
    rows: Rows = Differences(x.T.float().contiguous()) if rms else Cosines(x, inverse)
    factors = Factors(weights, margin, bonus)
    for group in grouped(lengths):
        run(group, rows, factors, lengths, counts, First(start, given), picks)
    return picks


class Factors(NamedTuple):
    """What makes a score of a distance: weights and bonuses per row, a margin per span."""

    weights: Tensor | None
    margin: Tensor | None
    bonus: Tensor | None

    def of(self, rows: slice, spans: slice) -> "Factors":
        """The factors of some rows, and of their spans."""
        weights, bonus = (None if t is None else t[rows] for t in (self.weights, self.bonus))
        return Factors(weights, None if self.margin is None else self.margin[spans], bonus)


class First(NamedTuple):
    """First choices of all spans, and how many each of them has; see `maxmin_select`."""

    start: Tensor | None
    given: Tensor | None = None

    def of(self, picks: slice, spans: slice) -> "First":
        """The first choices of some spans."""
        if self.start is None or self.given is None:
            return First(None if self.start is None else self.start[spans])
        return First(self.start[picks], self.given[spans])


def grouped(lengths: list[int]) -> list[list[int]]:
    """Group spans that run together.

    Consecutive spans share a group as long as their distances fit into ``GRAM_ELEMENTS``. A span
    with more than ``MAX_GRAM_ROWS`` rows has a group of its own.
    """
    result: list[list[int]] = []
    room = 0
    for span, length in enumerate(lengths):
        # MAX_GRAM_ROWS 10, room for 200 distances, spans of 8 8 8 20 8 rows:
        #     8 8 8 -> 192 distances, one group;   20 -> alone, in rounds;   8 -> a new group
        if length > MAX_GRAM_ROWS or length * length > room or not result:
            result.append([])
            room = GRAM_ELEMENTS if length <= MAX_GRAM_ROWS else 0
        result[-1].append(span)
        room -= length * length
    return result


def run(
    group: list[int],
    rows: Rows,
    factors: Factors,
    lengths: list[int],
    counts: list[int],
    first: First,
    picks: Tensor,
) -> None:
    """Choose the rows of the spans in one group and write them to `picks` ``(Σ counts,)``."""
    longest = max(lengths[span] for span in group)
    spans = slice(group[0], group[-1] + 1)
    row, pick = starts([*lengths, 0]), starts([*counts, 0])
    own = slice(pick[spans.start], pick[spans.stop])
    group_picks = picks[own]
    if not len(group_picks):
        return
    first = first.of(own, spans)
    # A long span is alone in its group; rows and picks count within it until the end.
    if longest > MAX_GRAM_ROWS:
        span, length = slice(row[spans.start], row[spans.stop]), lengths[spans.start]
        part = rows.part(span)
        begin = part.isolated() if first.start is None else first.start
        begin = begin[:1] if first.given is None else begin[: int(first.given[0])]
        run_rounds(part, factors.of(span, spans), length, begin, group_picks)
        group_picks += row[spans.start]
        return
    firsts = table([p - own.start for p in pick[spans.start : spans.stop + 1]], picks.device)
    every = slice(None)
    greedy(
        rows, row[spans.start : spans.stop + 1], firsts, first, factors.of(every, spans),
        group_picks,
    )  # fmt: skip


def run_rounds(rows: Rows, factors: Factors, length: int, start: Tensor, picks: Tensor) -> None:
    """Choose in one long span of `length` rows and write them to `picks`.

    The algorithm is that of :class:`tokencomp.kernels.maxmin_select.rounds.Rounds`, except that
    every round updates all rows. One launch does that without the host, whereas an update of
    selected rows would wait for the device several times per round.
    """
    device = picks.device
    nearest = torch.full((length,), torch.inf, device=device)
    weights, margin, bonus = factors
    remaining = torch.ones_like(nearest) if weights is None else weights.clone()
    new, done = start, 0
    while True:
        picks[done : done + len(new)] = new
        done += len(new)
        remaining[new] = TAKEN
        rows.closest(new, nearest)
        if done == len(picks):
            return
        # A chosen row has the factor TAKEN < 0, and no bonus that could lift it above 0.
        score = (nearest if margin is None else nearest + margin) * remaining
        if bonus is not None:
            score = torch.where(remaining < 0, score, score + bonus)
        tied = score >= score.max() * TIED
        ranked = score.masked_fill(tied, torch.inf).sort(descending=True, stable=True).indices
        candidates, others = ranked[:CANDIDATES].sort().values, ranked[CANDIDATES:]
        # Highest scores of other rows that tie with the best, and of those below: tensors of one
        # element, which the kernel reads without the host.
        bars = [
            score[others].masked_fill(hidden, -torch.inf).amax()
            for hidden in (~tied[others], tied[others])
        ]
        limit = min(len(candidates), len(picks) - done)
        steps_taken = torch.full((1,), limit, dtype=torch.int32, device=device)
        local = torch.zeros(limit, dtype=torch.int64, device=device)
        extra = None if bonus is None else bonus[candidates]
        # The round starts with the first of the rows that tie with the best; it is a candidate.
        greedy(
            rows.part(candidates), [0, len(candidates)], table([0, limit], device),
            First(torch.searchsorted(candidates, ranked[:1])),
            Factors(remaining[candidates], margin, extra), local,
            (nearest[candidates], *bars, steps_taken),
        )  # fmt: skip
        new = candidates[local[: int(steps_taken)]]


def greedy(
    rows: Rows,
    bounds: list[int],
    first_pick: Tensor,
    first: First,
    factors: Factors,
    picks: Tensor,
    resume: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Compute all distances of spans that begin at rows `bounds`, then take all steps.

    The last of the bounds is the end of the last span. Without first choices they are the rows
    whose nearest other row is farthest. `resume` holds the last four tensors of
    :func:`greedy_kernel` for a round, and is None otherwise.
    """
    lengths, device = [end - begin for begin, end in itertools.pairwise(bounds)], picks.device
    # Every row of a matrix takes a multiple of 16 entries (`pitch`).
    squares = [length * triton.cdiv(length, 16) * 16 for length in lengths]
    gram = torch.empty(sum(squares), dtype=torch.float32, device=device)
    first_row, first_gram = table(bounds, device), table(starts(squares), device, torch.int64)
    rows.pairs(first_row, first_gram, gram, max(lengths))
    start, given = first
    if start is None:
        nearest = torch.empty(bounds[-1], dtype=torch.float32, device=device)
        isolated_kernel[(max(lengths), len(lengths))](
            gram, first_row, first_gram, nearest, BLOCK=1024, num_warps=4
        )
        start = first_choice(nearest[bounds[0] :], lengths)
    wide = padded(max(lengths))
    weights, margin, bonus = factors
    greedy_kernel[(len(lengths),)](
        gram, first_row, first_gram, first_pick, start, weights, picks,
        margin, bonus, given, *(resume or (None,) * 4), WEIGHTED=weights is not None,
        MARGIN=margin is not None, BONUS=bonus is not None, GIVEN=given is not None,
        ROUND=resume is not None, BLOCK=wide, TIED=TIED,
        num_warps=max(1, min(16, wide // 256)),  # a thread has at most 16 values
    )  # fmt: skip
