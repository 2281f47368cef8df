"""What most methods say of the patches of a call: which stay, what becomes of them, or a score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokencomp.plan.reducer import StageReducer, label
from tokencomp.reducers._batch import best_rows, finite_values
from tokencomp.reducers.base import Reducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch


@dataclass(frozen=True)
class PatchReducer(Reducer):
    """A reducer that sees patches alone: special tokens stay without it.

    Where it compares places of whole grids (`grid = "whole"`), no patch is missing.
    """

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        if self.grid == "whole":
            return self.reduce_patches(Patches.whole(batch, keeps, label(self)))
        return self.reduce_patches(Patches.of(batch, keeps))

    @abstractmethod
    def reduce_patches(self, patches: Patches) -> Reduction:
        """`reduce_batch` of the patches, made by their `kept` or `replaced`."""


@dataclass(frozen=True)
class ChoosingReducer(PatchReducer):
    """A reducer that keeps some patches as they are."""

    def reduce_patches(self, patches: Patches) -> Reduction:
        return patches.kept(self.chosen(patches))

    @abstractmethod
    def chosen(self, patches: Patches) -> Tensor:
        """Numbers of the patches that stay, int64, ascending, as many as the budgets."""


@dataclass(frozen=True)
class ScoreReducer(ChoosingReducer):
    """A reducer that says how much every patch counts, and nothing else.

    A subclass implements `scores`. Of equal scores the lower index stays.

    Attributes
    ----------
    batched
        False: `scores` sees one span at a time. True: it sees all spans of a call at once, takes
        means and maxima within a span (`Patches.lengths`), and so scores no span by another one.
    """

    batched: ClassVar[bool] = False

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        if self.batched or len(batch) == 1:
            return super().reduce_batch(batch, keeps)
        return StageReducer.reduce_batch(self, batch, keeps)

    @abstractmethod
    def scores(self, patches: Patches) -> Tensor:
        """Importance of every patch of a span.

        Parameters
        ----------
        patches
            `features` (patches, d) of the span, or, if `batched`, of all spans, one after the
            other; `lengths` and `budgets` say how many patches each span has and how many stay.
            `of_patches` takes the rows of patches from a value per token, such as
            `patches.batch.scores`.

        Returns
        -------
        Tensor, shape (patches,)
            Finite; compared in float32.
        """

    def chosen(self, patches: Patches) -> Tensor:
        scores = finite_values(self.scores(patches), "scores")
        return best_rows(scores, patches.budgets, patches.lengths)
