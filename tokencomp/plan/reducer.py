"""What plans and the engine need of a reducer, and what they ask about it."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import keep_count

if TYPE_CHECKING:
    from tokencomp.tokens.kept import Kept
    from tokencomp.tokens.signals import Signal
    from tokencomp.tokens.spans import ModelFacts, VisualSpan
    from tokencomp.tokens.tokens import Tokens


class StageReducer(ABC):  # noqa: B024  # classes below it have abstract methods
    """The contract of a reducer but for its plan, which `tokencomp.Reducer` adds.

    Reducers make plans, and plans hold reducers. This class stands below both, so that the two
    modules do not import each other.
    """

    name: ClassVar[str] = ""
    batched: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that chooses anew sees one span at a time, unless it says `batched` itself."""
        super().__init_subclass__(**options)
        if vars(cls).keys() & {"reduce", "scores"} and "batched" not in vars(cls):
            cls.batched = False

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that the engine must supply in `Tokens` beyond features and grids."""
        return frozenset()

    @property
    def merges(self) -> bool:
        """Whether kept tokens take in dropped ones; `Kept.weights` then says how many."""
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

    def reduce(self, tokens: Tokens) -> Kept:
        """Choose (and possibly rewrite) of every span of `tokens` exactly its budget.

        `tokens` has one span, unless the reducer is `batched`.
        """
        raise OptionError(f"reducer {self.name!r} is a preset: it has a plan but no own step.")


def reduced(reducer: StageReducer, tokens: Tokens) -> Kept:
    """What a reducer keeps of the patches of a call.

    Raises
    ------
    PlanError
        It returned something that `Kept.check` refuses, or it needs patches that are missing.
    """
    from tokencomp.kernels.dispatch import checked
    from tokencomp.tokens.kept import Kept

    if reducer.grid == "whole":
        tokens.check_whole(label(reducer))
    if reducer.batched:
        with checked():  # a reducer of batches looks at its input once, see `finite_features`
            return _typed(reducer, reducer.reduce(tokens)).check(tokens, label(reducer))
    parts = [_typed(reducer, reducer.reduce(t)).check(t, label(reducer)) for t in tokens]
    return parts[0] if len(parts) == 1 else Kept.joined(parts, tokens)


def only_plans(reducer: StageReducer) -> bool:
    """Whether it has no step of its own: a preset or a composition, which plans others."""
    return type(reducer).reduce is StageReducer.reduce


def counts_itself(reducer: StageReducer) -> bool:
    """Whether it leaves a fixed number of tokens, whatever the ratio."""
    return type(reducer).keep_count is not StageReducer.keep_count


def label(reducer: StageReducer) -> str:
    """How messages name a reducer."""
    return reducer.name or type(reducer).__name__


def _typed(reducer: StageReducer, kept: object) -> Kept:
    from tokencomp.tokens.kept import Kept

    if isinstance(kept, Kept):
        return kept
    raise PlanError(
        f"reducer {label(reducer)!r} returned a {type(kept).__name__}. "
        "`reduce(tokens)` must return a tokencomp.Kept."
    )
