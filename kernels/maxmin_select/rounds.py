"""Plain PyTorch version of max-min selection in one long span: rounds among the best rows."""

import numpy as np
import torch
from tokencomp.kernels.maxmin_select.metrics import Metric
from torch import Tensor

# Number of cosines that are in memory at once (64 MiB in fp32).
GRAM_ELEMENTS = 1 << 24
# Longer spans proceed in rounds. A round has this many candidates and may choose all of them.
ROUND = 256
# Weight of a chosen row. No distance is 0, so its score is negative and never the best again.
TAKEN = -1.0


class Rounds:
    """Selection in one long span ``(L, D)`` without L × L distances or steps that read all rows.

    Scores never rise, so the score of a row against some of the choices is an upper bound of its
    score against all of them. A row is updated only when its bound is among the best, and most rows
    never are. Each round takes the ROUND best rows as candidates; the next best row is the guard.
    As long as the best candidate is above the score that the guard had when the round began, it is
    the best row of all, and only the cosines between candidates are needed. This algorithm is ours.

    Attributes
    ----------
    order
        Chosen rows in the order of their choice, int64 ``(count,)``; valid up to `done`.
    done
        Number of choices so far.
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
        count: int,
        measure: Metric,
    ) -> None:
        self.rows, self.weight, self.margin, self.measure = rows, weight.clone(), margin, measure
        self.order, self.done = start.new_empty(count), 1
        self.order[0] = start
        self.chosen = rows.new_empty(count, rows.shape[1])
        self.chosen[0] = rows[start]
        self.weight[start] = TAKEN
        self.nearest = measure.closest(rows, self.chosen[:1])
        self.seen = torch.ones_like(self.nearest, dtype=torch.int64)

    def run(self) -> Tensor:
        """Run rounds until all rows are chosen; return `order`."""
        while self.done < len(self.order):
            best = self.best(ROUND + 1)
            candidates, guard = best[:-1].sort().values, best[-1]
            bar = float(self.score(guard)), -int(guard)
            rows, nearest = self.rows[candidates], self.nearest[candidates].cpu()
            distance, weight = self.measure.pairs(rows, rows).cpu(), self.weight[candidates].cpu()
            limit = len(self.order) - self.done
            picks = _round(
                distance, weight, nearest, candidates.tolist(), float(self.margin), bar, limit
            )
            picked = torch.tensor(picks, device=candidates.device)
            new, place = candidates[picked], slice(self.done, self.done + len(picks))
            self.order[place], self.chosen[place], self.done = new, rows[picked], place.stop
            self.nearest[candidates], self.seen[candidates] = nearest.to(rows.device), self.done
            self.weight[new] = TAKEN
        return self.order

    def score(self, rows: Tensor) -> Tensor:
        """Return the scores of `rows`, which are upper bounds where rows are not up to date."""
        return (self.nearest[rows] + self.margin) * self.weight[rows]

    def best(self, count: int) -> Tensor:
        """Return the `count` best rows, best first, all of them up to date.

        The rows with the best bounds are updated, which can only lower their scores, until the best
        `count` rows are all up to date. The others then have lower bounds, hence lower scores.
        """
        score, reach = (self.nearest + self.margin) * self.weight, count
        while True:
            ranked = score.sort(descending=True, stable=True).indices
            if bool((self.seen[ranked[:count]] == self.done).all()):
                return ranked[:count]
            self.refresh(ranked[:reach])
            score[ranked[:reach]] = self.score(ranked[:reach])
            reach *= 2  # without doubling, bounds that keep falling would take many sorts

    def refresh(self, rows: Tensor) -> None:
        """Compare `rows` with the choices that they have not seen, equal numbers together."""
        seen = self.seen[rows]
        for already_seen in seen[seen < self.done].unique().tolist():
            unseen = self.chosen[already_seen : self.done]
            for part in rows[seen == already_seen].split(max(1, GRAM_ELEMENTS // len(unseen))):
                distance = self.measure.closest(self.rows[part], unseen)
                self.nearest[part] = torch.minimum(self.nearest[part], distance)
        self.seen[rows] = self.done


def _round(
    distance: Tensor,
    weight: Tensor,
    nearest: Tensor,
    rows: list[int],
    margin: float,
    bar: tuple[float, int],
    limit: int,
) -> list[int]:
    """Choose at most `limit` candidates while the best of them is above `bar`.

    `bar` is the guard's score and minus its row, so that a tie goes to the lower row. `weight` and
    `nearest` change in place. The steps run on the host in NumPy: a choice is four operations on
    short rows, whose start-up cost dominates.
    """
    picks: list[int] = []
    distances, weights, near = distance.numpy(), weight.numpy(), nearest.numpy()
    scores = np.empty_like(near)
    with np.errstate(over="ignore"):
        while len(picks) < limit:
            np.multiply(np.add(near, margin, out=scores), weights, out=scores)
            best = int(scores.argmax())  # returns the first of equal scores
            if (float(scores[best]), -rows[best]) < bar:
                break
            picks.append(best)
            weights[best] = TAKEN
            np.minimum(near, distances[best], out=near)
    return picks
