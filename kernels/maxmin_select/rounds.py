"""Plain PyTorch version of max-min selection in one long span: rounds among the best rows."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Smallest distance. The cosine of two copies of a row differs from 1 by rounding: 6e-7 in fp32, and
# more on tensor cores, which truncate their sums. This rounding must not rank copies; the weight
# decides between them.
EPSILON = 1e-5
# Scores of at least this share of the best one are ties with it. The last bits of features differ
# between batches of another shape, and must not decide between rows that are equally far.
TIED = 1 - 4e-6
# Number of cosines that are in memory at once (64 MiB in fp32).
GRAM_ELEMENTS = 1 << 24
# Longer spans proceed in rounds. A round has this many candidates and may choose all of them.
ROUND = 256
# Weight of a chosen row. No distance is 0, so its score is negative and never the best again.
TAKEN = -1.0


# Rows at 0 1 2 5 6 10 on a line, row 0 is chosen, and a round has two candidates (ROUND = 2):
#     row                     0  1  2  3  4   5
#     distance to row 0       -  1  2  5  6  10    candidates 4 and 5; the bar is 5, of row 3
#     row 5 is chosen         -  1  2  5  4   -    row 4 is closer to it, and 4 is below the bar:
#                                                  row 3 may be better, so the round ends
#     next round              -  1  2  5  4   -    rows 2 and 3 are compared with row 5; row 1 has
#                                                  the bound 1, is not among the best, and waits
#     row 3 is chosen         -  1  2  -  1   -    1 is below the bar 2 of row 2: the round ends
class Rounds:
    """Selection in one long span ``(L, D)`` without L × L distances or steps that read all rows.

    Scores never rise, so the score of a row against some of the choices is an upper bound of its
    score against all of them. A row is updated only when its bound is among the best, and most rows
    never are. Each round takes the ROUND best rows as candidates; of rows that tie with the best,
    the first ones. As long as the best candidate is above the scores that all other rows had when
    the round began (not below those of rows that tied then and come after the candidates), it
    is the best row of all, and only the cosines between candidates are needed. This algorithm is
    ours.

    Attributes
    ----------
    order
        Chosen rows in the order of their choice, int64 ``(count,)``; valid up to `done`.
    done
        Number of choices so far.
    measure
        The metric, one of ``METRICS``.
    rows
        The rows as the metric compares them: unit vectors for the cosine.
    chosen
        Those of them that are chosen, ``(count, D)``; valid up to `done`.
    nearest
        Distance of every row to the closest of the first `seen` choices, ``(L,)``.
    seen
        With how many of the choices each row has been compared, int64 ``(L,)``.
    """

    def __init__(
        self,
        rows: Tensor,
        weight: Tensor,
        margin: Tensor,
        start: Tensor,
        bonus: Tensor,
        count: int,
        measure: Any,
    ) -> None:
        self.rows, self.weight, self.margin, self.measure = rows, weight.clone(), margin, measure
        self.bonus = bonus.clone()
        self.order, self.done = start.new_empty(count), len(start)
        self.order[: self.done] = start
        self.chosen = rows.new_empty(count, rows.shape[1])
        self.chosen[: self.done] = rows[start]
        self.weight[start], self.bonus[start] = TAKEN, 0.0
        # (part of L, first choices) at a time: selections may give many first choices.
        parts = rows.split(max(1, GRAM_ELEMENTS // self.done))
        self.nearest = torch.cat([measure.closest(p, self.chosen[: self.done]) for p in parts])
        self.seen = torch.full_like(self.nearest, self.done, dtype=torch.int64)

    def run(self) -> Tensor:
        """Run rounds until all rows are chosen; return `order`."""
        while self.done < len(self.order):
            # One row more than candidates: the best of the other rows must have an exact score too.
            score, tied, ranked = self.ranked(ROUND + 1)
            # In ascending order, so that the first candidate of a tie is the lowest row.
            candidates, others = ranked[:ROUND].sort().values, ranked[ROUND:]
            rows, nearest = self.rows[candidates], self.nearest[candidates].cpu()
            distance, weight = self.measure.pairs(rows, rows).cpu(), self.weight[candidates].cpu()
            limit = len(self.order) - self.done
            bars = highest(score[others], tied[others]), highest(score[others], ~tied[others])
            extra = self.bonus[candidates].cpu()
            picks = _round(distance, weight, nearest, extra, float(self.margin), bars, limit)
            picked = torch.tensor(picks, device=candidates.device)
            new, place = candidates[picked], slice(self.done, self.done + len(picks))
            self.order[place], self.chosen[place], self.done = new, rows[picked], place.stop
            # Candidates were compared with all choices of the round; other rows keep `seen`.
            self.nearest[candidates], self.seen[candidates] = nearest.to(rows.device), self.done
            self.weight[new], self.bonus[new] = TAKEN, 0.0
        return self.order

    def ranked(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all rows, which of them tie with the best, and all rows in order.

        Rows that tie come first, in their own order; then the others, best first. Of these, scores
        after the first `count` rows may be upper bounds.

        The rows with the best bounds are updated, which can only lower their scores, until the best
        `count` rows are all up to date. The others then have lower bounds, hence lower scores.
        """
        score, reach = (self.nearest + self.margin) * self.weight + self.bonus, count
        while True:
            # Rows that tie with the best rank first and by row, however many there are.
            tied = score >= score.max() * TIED
            ranked = score.masked_fill(tied, torch.inf).sort(descending=True, stable=True).indices
            needed = max(count, int(tied.sum()))
            if not bool(self.stale(ranked[:needed]).any()):
                return score, tied, ranked
            rows = ranked[: max(reach, needed)]
            rows = rows[self.stale(rows)]
            self.refresh(rows)
            score[rows] = (self.nearest[rows] + self.margin) * self.weight[rows] + self.bonus[rows]
            reach *= 2  # without doubling, bounds that keep falling would take many sorts

    def stale(self, rows: Tensor) -> Tensor:
        """Whether the distances of `rows` may still fall: not below the smallest distance."""
        return (self.seen[rows] < self.done) & (self.nearest[rows] > EPSILON)

    def refresh(self, rows: Tensor) -> None:
        """Compare `rows` with the choices that they have not seen, equal numbers together."""
        seen = self.seen[rows]
        for already_seen in seen[seen < self.done].unique().tolist():
            # Choices are in order, so rows that saw the first m of them miss the same ones.
            unseen = self.chosen[already_seen : self.done]
            for part in rows[seen == already_seen].split(max(1, GRAM_ELEMENTS // len(unseen))):
                distance = self.measure.closest(self.rows[part], unseen)
                self.nearest[part] = torch.minimum(self.nearest[part], distance)
        self.seen[rows] = self.done


def highest(score: Tensor, of: Tensor) -> float:
    """The highest of some scores, -inf of none."""
    return float(score[of].max()) if bool(of.any()) else -torch.inf


def _round(
    distance: Tensor,
    weight: Tensor,
    nearest: Tensor,
    bonus: Tensor,
    margin: float,
    bars: tuple[float, float],
    limit: int,
) -> list[int]:
    """Choose candidates, at least one and at most `limit`, while no other row could come first.

    `bars` are the highest scores, when the round began, of the other rows that tied with the best,
    and of those that did not. `weight`, `nearest` and `bonus` change in place. The steps run on the
    host in NumPy: a choice is six operations on short rows, whose start-up cost dominates.
    """
    picks: list[int] = []
    distances, weights, near = distance.numpy(), weight.numpy(), nearest.numpy()
    extra = bonus.numpy()
    scores, number = np.empty_like(near), near.dtype.type
    behind, below, share = map(number, (*bars, TIED))
    with np.errstate(over="ignore"):
        while len(picks) < limit:
            np.multiply(np.add(near, margin, out=scores), weights, out=scores)
            np.add(scores, extra, out=scores)
            best = scores.max()
            # The first choice of a round is the best row of all. Later, another row may be better:
            # one that tied with the best when the round began (`behind`), or another (`below`).
            line = max(best, behind) * share
            if picks and (best < behind or line <= below):
                break
            first = int((scores >= line).argmax())
            picks.append(first)
            weights[first], extra[first] = TAKEN, 0.0
            np.minimum(near, distances[first], out=near)
    return picks
