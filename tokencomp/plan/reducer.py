"""What plans and the engine need of a reducer, and what they ask about it."""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import keep_count

if TYPE_CHECKING:
    from tokencomp.tokens.reduction import Reduction
    from tokencomp.tokens.signals import Signal
    from tokencomp.tokens.spans import ModelFacts, SpanBatch, VisualSpan, VisualTokens


class StageReducer(ABC):  # noqa: B024  # classes below it have abstract methods
    """The contract of a reducer but for its plan, which `tokencomp.Reducer` adds.

    Reducers make plans, and plans hold reducers. This class stands below both, so that the two
    modules do not import each other.
    """

    name: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that the engine must supply in `VisualTokens` beyond features and grid."""
        return frozenset()

    @property
    def merges(self) -> bool:
        """Whether kept tokens take in dropped ones; `Reduction.sizes` then says how many."""
        return False

    @property
    def grid(self) -> Literal["any", "known", "whole"]:
        """Which grid a span must have.

        "known": it reads places in the grid, so that spans of unknown grid are refused. "whole": it
        compares places of the whole grid, so that no earlier stage may have dropped tokens either.
        """
        return "any"

    @property
    def entry_only(self) -> bool:
        """Whether it reads the input of the first layer alone, as its weights do, for example."""
        return False

    def unused_options(self, pixels: bool) -> dict[str, str]:
        """Options that have no effect beside the others, by name, and why.

        Parameters
        ----------
        pixels
            Whether it sees pixels: in the vision tower, before its first block.
        """
        return {}

    def keep_count(self, span: VisualSpan, fraction: float) -> int:
        """Visual tokens left of `span` by a stage that leaves `fraction` of it.

        Plans ask it for every stage, in the engine and in servers alike (`Plan.counts`).
        """
        return keep_count(span.visual, fraction, len(span.special))

    def bind(self, facts: ModelFacts) -> StageReducer:
        """This reducer for one model. Trained reducers find and check their weights in it.

        Raises
        ------
        WeightsError
            Weights are missing, damaged, or of another model.
        """
        return self

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Choose (and possibly rewrite) exactly `keep` of the tokens of one span."""
        from tokencomp.tokens.spans import SpanBatch

        if only_plans(self):
            raise OptionError(f"reducer {self.name!r} is a preset: it has a plan but no own step.")
        return self.reduce_batch(SpanBatch.of(tokens), [keep])

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        """`reduce` of all spans of a call.

        Parameters
        ----------
        keeps
            Tokens that stay of every span, special ones included: at least those and one more, and
            fewer than all.

        Returns
        -------
        Reduction
            Rows of the batch; those of a span stand before those of the next.
        """
        from tokencomp.tokens.reduction import Reduction

        parts = [
            _typed(self, self.reduce(tokens, keep)).check(tokens, keep, label(self))
            for tokens, keep in zip(batch.spans(), keeps, strict=True)
        ]
        return Reduction.join(parts, batch)


def reduced(reducer: StageReducer, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
    """What a reducer keeps of the spans of a batch, see `StageReducer.reduce_batch`.

    Raises
    ------
    PlanError
        It returned something that `Reduction.check_batch` refuses.
    """
    from tokencomp.kernels.dispatch import checked

    if _step(type(reducer)) != "reduce_batch":
        return StageReducer.reduce_batch(reducer, batch, keeps)
    with checked():  # a reducer of batches looks at its input once, see `finite_features`
        reduction = reducer.reduce_batch(batch, keeps)
    return _typed(reducer, reduction).check_batch(batch, keeps, label(reducer))


def only_plans(reducer: StageReducer) -> bool:
    """Whether it has no step of its own: a preset or a composition, which plans others."""
    return _step(type(reducer)) is None


def counts_itself(reducer: StageReducer) -> bool:
    """Whether it leaves a fixed number of tokens, whatever the ratio."""
    return type(reducer).keep_count is not StageReducer.keep_count


def label(reducer: StageReducer) -> str:
    """How messages name a reducer."""
    return reducer.name or type(reducer).__name__


@functools.cache
def _step(cls: type[StageReducer]) -> str | None:
    """The method of a class that chooses tokens; a subclass may override `reduce` alone."""
    for base in cls.__mro__[: cls.__mro__.index(StageReducer)]:
        for name in ("reduce_batch", "reduce"):
            if name in vars(base):
                return name
    return None


def _typed(reducer: StageReducer, reduction: object) -> Reduction:
    from tokencomp.tokens.reduction import Reduction

    if isinstance(reduction, Reduction):
        return reduction
    raise PlanError(
        f"reducer {label(reducer)!r} returned a {type(reduction).__name__}. "
        "`reduce(tokens, keep)` must return a tokencomp.Reduction."
    )
