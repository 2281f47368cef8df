"""The contract of a reducer, and the registry. One method = one file + one decorator."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tokencomp.errors import OptionError, PlanError, ScoreError, unknown_name
from tokencomp.plan import Plan, Stage, check_ratio, count, kept_count
from tokencomp.reducers._options import check_types
from tokencomp.tokens import Grid, Reduction, Signal, VisualSpan, VisualTokens

_REGISTRY: dict[str, type[Reducer]] = {}
_loaded = False


@dataclasses.dataclass(frozen=True)
class Reducer:
    """Base class: a frozen dataclass whose fields are its options in Python, JSON and the CLI.

    A reducer is stateless, batch-invariant (it sees one span at a time) and stage-agnostic.
    Subclasses implement `reduce`; methods that act between layers override `plan`. Options must
    fit their annotations; a `__post_init__` that checks ranges calls `super().__post_init__()`.

    Attributes
    ----------
    name
        Registry name.
    summary
        One line for `tokencomp list`, with the source.
    serving_safe
        True if the kept count is a pure function of (grid, ratio), nothing depends on the text,
        and it acts at entry: the same object then runs inside vLLM.
    serving_safe_with
        The option that makes it so, where its defaults do not: "signal=norm or none".
    merges
        True if kept tokens take others in; `Reduction.sizes` then says how many.
    whole_spans
        True if it compares places of a whole grid: no earlier stage may have dropped tokens.
    own_count
        True if it leaves a number of tokens of its own, whatever the ratio.
    entry_only
        True if its weights were trained on what stands before layer 0.
    revision
        Raised where the same options choose other tokens than in an earlier release, so that
        stored answers of both do not mix.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    serving_safe: ClassVar[bool] = False
    serving_safe_with: ClassVar[str] = ""
    merges: ClassVar[bool] = False
    whole_spans: ClassVar[bool] = False
    own_count: ClassVar[bool] = False
    entry_only: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_types(self.name or type(self).__name__, self)

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals the hooks must supply in `VisualTokens` beyond features and grid."""
        return frozenset()

    def plan(self, ratio: float, num_layers: int) -> Plan:
        """Stages that remove `ratio` of the visual-token work of a `num_layers` decoder."""
        ratio = check_ratio(ratio)
        return Plan((Stage(0, 1.0 - ratio, self),)) if ratio > 0 else Plan()

    def kept_count(self, grid: Grid, ratio: float, special: int = 0) -> int:
        """Tokens left of one span at entry (see `tokencomp.plan.kept_count`)."""
        return kept_count(grid, ratio, special)

    def span_count(self, span: VisualSpan, fraction: float) -> int:
        """Visual tokens left of `span` by a stage that leaves `fraction` of it."""
        return count(span.visual, fraction, len(span.special))

    def for_model(self, model: nn.Module) -> Reducer:
        """This reducer for `model`: trained ones find and check their weights here."""
        return self

    def for_positions(self, mrope: bool) -> Reducer:
        """This reducer for models with three rows of positions, or with one per token."""
        return self

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Choose (and possibly rewrite) exactly `keep` of the tokens of one span."""
        raise OptionError(f"reducer {self.name!r} is a preset: it has a plan but no own step.")

    def reduced(self, tokens: VisualTokens, keep: int) -> Reduction:
        """`reduce`, and a look at what it returned (see `Reduction.check`)."""
        name = self.name or type(self).__name__
        reduction = self.reduce(tokens, keep)
        if not isinstance(reduction, Reduction):
            raise PlanError(
                f"reducer {name!r} returned a {type(reduction).__name__}. "
                "`reduce(tokens, keep)` must return a tokencomp.Reduction."
            )
        return reduction.check(tokens, keep, name)

    def options(self) -> dict[str, Any]:
        """The options of this object, ready for JSON."""
        return dataclasses.asdict(self)


R = TypeVar("R", bound=type[Reducer])


def register_reducer(name: str) -> Callable[[R], R]:
    """Class decorator that makes a reducer available by name."""

    def decorate(cls: R) -> R:
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def _load_all() -> None:
    global _loaded
    if not _loaded:
        package = importlib.import_module("tokencomp.reducers")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"tokencomp.reducers.{module.name}")
        _loaded = True  # last: a thread that comes meanwhile waits for the same imports


def available_reducers() -> dict[str, type[Reducer]]:
    """All registered reducers by name."""
    _load_all()
    return dict(sorted(_REGISTRY.items()))


def make_reducer(name: str | Reducer, /, **options: Any) -> Reducer:
    """Build a reducer from its registry name and options; "merge+prune" composes two.

    Raises
    ------
    UnknownNameError
        No reducer has that name (close matches are named).
    OptionError
        An option the reducer does not have, or a value it refuses.
    """
    if isinstance(name, Reducer):
        if options:
            raise OptionError(
                f"options {sorted(options)} were given beside a ready {name.name!r} object. Set "
                "them when you build it."
            )
        return name
    registry = available_reducers()
    if "+" in str(name):
        from tokencomp.reducers.compose import compose

        return compose(name, options)
    if isinstance(name, type) and issubclass(name, Reducer):
        raise OptionError(
            f"reducer={name.__name__} is a class. Give an object with its options set: "
            f"reducer={name.__name__}(...)."
        )
    if not isinstance(name, str) or name not in registry:
        raise unknown_name("reducer", str(name), registry)
    cls = registry[name]
    allowed = [f.name for f in dataclasses.fields(cls)]
    wrong = sorted(set(options) - set(allowed))
    if wrong:
        raise OptionError(
            f"reducer {name!r} has no option {', '.join(map(repr, wrong))}. "
            f"It has: {', '.join(allowed) or 'none'}."
        )
    return cls(**options)


def check_choice(owner: str, option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise `OptionError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise OptionError(f"{owner}: {option}={value!r}; allowed: {', '.join(map(repr, allowed))}.")


def top_k(scores: Tensor, special: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` best-scored tokens, special ones first, ascending.

    Scored in fp32; ties go to the lower index.

    Parameters
    ----------
    scores : Tensor, shape (n,)
    special : Tensor of bool, shape (n,)
    keep : int

    Raises
    ------
    ScoreError
        A score is NaN.
    """
    from tokencomp.kernels import topk_stable

    scores = scores.float()
    if torch.isnan(scores).any():
        raise ScoreError(
            f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN. The hidden "
            "states or attention logits overflowed; run the model in bfloat16 or float32."
        )
    return topk_stable(scores.masked_fill(special, torch.inf), keep)
