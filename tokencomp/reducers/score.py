"""Methods that are a score: the best-scored patches of every span stay."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokencomp.reducers._rows import finite_values
from tokencomp.reducers.base import Reducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch


@dataclass(frozen=True)
class ScoreReducer(Reducer):
    """A reducer that says how much every patch counts, and nothing else.

    A subclass implements `scores`. It sees patches alone: special tokens stay without it. Of equal
    scores the lower index stays.
    """

    @abstractmethod
    def scores(self, patches: Patches) -> Tensor:
        """Importance of every patch of all spans of a call.

        Parameters
        ----------
        patches
            `features` (patches, d) of all spans, one after the other; `lengths` and `budgets` say
            how many each span has and how many stay. `of_patches` takes the rows of patches from
            a value per token, such as `patches.batch.scores`.

        Returns
        -------
        Tensor, shape (patches,)
            Finite; compared in float32.
        """

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import topk_stable

        patches = Patches.of(batch, keeps)
        scores = finite_values(self.scores(patches), "scores")
        return patches.kept(topk_stable(scores, patches.budgets, spans=patches.lengths))
