"""The contract of a reducer. One method is one file with one subclass of `Reducer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import check_ratio, keep_count
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage, StageReducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import ModelFacts, SpanBatch, VisualSpan, VisualTokens
from tokencomp.validation import check_effect, check_types

PROBE_RATIOS = (0.1, 0.5, 0.9)
PROBE_LAYERS = 32


@dataclasses.dataclass(frozen=True)
class Reducer(StageReducer):
    """Base class: a frozen dataclass whose fields are its options in Python, JSON and the CLI.

    A reducer has no state and does not know at which stage it acts. A subclass implements `reduce`,
    which sees one span, or `reduce_batch`, which sees all spans of a call and treats them with one
    launch per step; either gives the other. What is chosen in a span must not depend on the other
    spans. One that acts between layers overrides `plan`. Options must fit their annotations; a
    `__post_init__` that checks more calls `super().__post_init__()`; options that others make
    useless belong into `idle`, so that nobody sets them in vain. What is always true of a
    method is a class attribute (`merges = True`); what depends on an option is a property.

    Attributes
    ----------
    name
        Registry name.
    summary
        One line for `tokencomp list`, with the source.
    revision
        To be raised when the same options start to choose other tokens than in an earlier
        release, so that stored answers of both are not mixed.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_types(self._label, self)
        check_effect(self._label, self, self.idle(pixels=True))

    @property
    def revision(self) -> int:
        return 1

    @property
    def only_plans(self) -> bool:
        """Whether it has no step of its own: a preset or a composition, which plans others."""
        return type(self).reduce is Reducer.reduce and not self._batched

    @property
    def own_count(self) -> bool:
        return type(self).keep_count is not Reducer.keep_count

    @property
    def _batched(self) -> bool:
        """Whether `reduce_batch` counts; a subclass may override `reduce` alone."""
        for base in type(self).__mro__:
            if base is Reducer or "reduce" in vars(base):
                return base is not Reducer and "reduce_batch" in vars(base)
            if "reduce_batch" in vars(base):
                return True
        return False

    @property
    def serving_safe(self) -> bool:
        """Whether it runs inside engines that fix placeholder counts before the model runs.

        Its keep count must follow from grid and ratio alone, it must act at entry only, and it
        must not need signals: what it then chooses depends on the media item alone, so that
        prefix caches may share the result across questions.
        """
        if self.needs or self.own_count:
            return False
        for ratio in PROBE_RATIOS:
            stages = self.plan(ratio, PROBE_LAYERS).stages
            if len(stages) != 1 or stages[0].layer > 0 or stages[0].reducer is not self:
                return False
        return True

    def plan(self, ratio: float, num_layers: int) -> Plan:
        """Stages that remove `ratio` of the visual-token work of a `num_layers` decoder."""
        ratio = check_ratio(ratio)
        return Plan((Stage(0, 1.0 - ratio, self),)) if ratio > 0 else Plan()

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which the paper's own schedule cuts; () for methods without one.

        A ratio that this schedule cannot reach moves or adds cuts: see `moved`.
        """
        return ()

    def moved(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        """How the plan for `ratio` departs from the paper's rule, in words; "" if it does not.

        Parameters
        ----------
        frames
            Steps in time of the videos that are asked about; 0 if unknown, or if there are none.
        """
        published = self.published_layers(num_layers)
        layers = [stage.layer for stage in self.plan(ratio, num_layers).stages]
        if not published or {*layers} <= {*published}:
            return ""
        ours, theirs = (", ".join(map(str, sorted(x))) for x in (layers, published))
        return f"cuts before layer {ours}; the paper's schedule: {theirs}"

    def keep_count(self, span: VisualSpan, fraction: float) -> int:
        """Visual tokens left of `span` by a stage that leaves `fraction` of it.

        Plans ask it for every stage, in the engine and in servers alike (`Plan.counts`).
        """
        return keep_count(span.visual, fraction, len(span.special))

    def bind(self, facts: ModelFacts) -> Reducer:
        """This reducer for one model. Trained reducers find and check their weights in it.

        Raises
        ------
        WeightsError
            Weights are missing, damaged, or of another model.
        """
        return self

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Choose (and possibly rewrite) exactly `keep` of the tokens of one span."""
        if not self._batched:
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
        parts = [
            self.reduced(tokens, keep) for tokens, keep in zip(batch.spans(), keeps, strict=True)
        ]
        return Reduction.join(parts, batch)

    def reduced(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The result of `reduce`, once it has passed `Reduction.check`."""
        return self._checked(self.reduce(tokens, keep)).check(tokens, keep, self._label)

    def reduced_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        """The result of `reduce_batch`, once it has passed `Reduction.check_batch`."""
        if not self._batched:
            return Reducer.reduce_batch(self, batch, keeps)
        from tokencomp.kernels.dispatch import checked

        with checked():  # a reducer of batches looks at its input once, see `finite_features`
            reduction = self._checked(self.reduce_batch(batch, keeps))
        return reduction.check_batch(batch, keeps, self._label)

    @property
    def _label(self) -> str:
        return self.name or type(self).__name__

    def _checked(self, reduction: object) -> Reduction:
        if isinstance(reduction, Reduction):
            return reduction
        raise PlanError(
            f"reducer {self._label!r} returned a {type(reduction).__name__}. "
            "`reduce(tokens, keep)` must return a tokencomp.Reduction."
        )

    def options(self) -> dict[str, Any]:
        """The options of this object, ready for JSON."""
        return dataclasses.asdict(self)
