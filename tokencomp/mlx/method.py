"""Method of a patch of mlx-vlm: ratio or budget, and reducer, checked once."""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from tokencomp.errors import MissingDependencyError, OptionError
from tokencomp.mlx.selection import SELECT, merged
from tokencomp.mlx.spans import Span
from tokencomp.plan.counts import Budget, BudgetShare, check_ratio
from tokencomp.plan.options import OPTIONS, StageOptions, one_amount
from tokencomp.plan.plan import keep_count


class KeptRows(NamedTuple):
    """Kept rows of a span.

    Attributes
    ----------
    offsets : ndarray of int64, shape (k,)
        Offsets in the span, ascending, including line breaks.
    features : array, shape (k, d), or None
        New features of these rows, if others are merged into them.
    sizes : ndarray of int64, shape (k,), or None
        Number of tokens that each row represents, if rows have weights.
    """

    offsets: np.ndarray
    features: mx.array | None = None
    sizes: np.ndarray | None = None


@dataclass(frozen=True)
class ChosenMethod(StageOptions):
    """A ratio, a reducer by name and its options; or a budget in tokens in place of the ratio.

    A `merge` of None becomes what it means for the reducer.

    Raises
    ------
    RatioError, OptionError, UnknownNameError
        A ratio outside [0, 1), or a budget that is no number of tokens, or both; a reducer that
        does not exist or that reads more than features, or an option that it does not have.
    MissingDependencyError
        A reducer that needs torch, which is not installed.
    """

    ratio: float | None = None
    reducer: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None

    def __post_init__(self) -> None:
        asked = one_amount(self.ratio, self.budget) or {"ratio": 0.5}
        if self.budget is None:
            object.__setattr__(self, "ratio", check_ratio(asked["ratio"]))
        elif Budget.of(self.budget).whole_prompt:
            raise OptionError(
                f"budget={self.budget!r}: tokencomp.mlx has budgets of single images and videos. "
                "Give a number."
            )
        if self.merge is None:
            object.__setattr__(self, "merge", OPTIONS["merge"].meaning(self.reducer))
        # Refuses what cannot run, before any prompt.
        self.check_options(self.torch_reducer)

    @property
    def off(self) -> bool:
        return self.budget is None and not self.ratio

    @property
    def amount(self) -> str:
        """Ratio or budget in words."""
        return f"ratio {self.ratio}" if self.budget is None else f"budget {self.budget}"

    def left(self, share: BudgetShare) -> float:
        """Fraction of a span that is kept."""
        if self.budget is None:
            return 1 - (self.ratio or 0.0)
        budget = Budget.of(self.budget)
        return budget.of_part(budget.left(share), share)

    @property
    def name(self) -> str:
        return "kcenter" if self.reducer == "auto" else self.reducer

    @functools.cached_property
    def torch_reducer(self) -> Any:
        """The reducer of `tokencomp.reducers`; None: those of `SELECT` and `merged` do all."""
        if self.name in SELECT and self.stage_options.keys() <= {"merge"}:
            allowed = list(inspect.signature(SELECT[self.name]).parameters)[3:]
            if wrong := sorted(set(self.options) - set(allowed)):
                raise OptionError(
                    f"reducer {self.name!r} has no option {wrong[0]!r} on MLX. "
                    f"Allowed: {', '.join(allowed) or 'none'}."
                )
            return None
        try:
            from tokencomp.reducers.registry import make_reducer
            from tokencomp.serving.servable import check_servable
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"reducer {self.reducer!r} needs {error.name}, which is not installed. Without it "
                f"MLX has {', '.join(SELECT)}."
            ) from None
        return check_servable(make_reducer(self.name, **self.options))

    @property
    def salt(self) -> int:
        """A number that differs between methods, for cache keys."""
        values = [self.ratio, self.budget, self.name, self.options, self.merge]
        text = json.dumps(values, sort_keys=True)
        return zlib.crc32(text.encode())

    @property
    def weighs(self) -> bool:
        """Whether a row may represent several tokens."""
        return bool(self.merge) and not self.off

    def kept(self, span: Span, share: BudgetShare, x: mx.array) -> KeptRows:
        """Reduce one span of tokens x (n, d); `share`: its share in a budget."""
        special = np.flatnonzero(span.special)
        left = self.left(share)
        keep = keep_count(len(x), left, len(special))
        if keep in (0, len(x)):
            return KeptRows(np.arange(keep))
        merges = keep > len(special) and self.merges(span.modality, left)
        if self.torch_reducer is not None:
            return self._by_torch(span, x, keep, left, merges)
        patches = np.flatnonzero(~span.special)
        rows = x if not len(special) else x[mx.array(patches)]
        chosen = SELECT[self.name](rows, span.grid, keep - len(special), **self.options)
        offsets = np.sort(np.append(patches[chosen], special))
        if not merges:
            return KeptRows(offsets)
        features, sizes = merged(x, offsets, span.special)
        return KeptRows(offsets, features.astype(x.dtype), sizes)

    def _by_torch(self, span: Span, x: mx.array, keep: int, left: float, merges: bool) -> KeptRows:
        import torch

        from tokencomp.plan.plan import Stage
        from tokencomp.reducers.choice import Cut, Patches, choose_patches
        from tokencomp.tokens.tokens import VisualSpan

        modality: Any = span.modality
        special = tuple(np.flatnonzero(span.special).tolist())
        cut = Cut.of(VisualSpan(0, len(x), span.grid, modality, special), len(x), keep, left)
        rows = torch.from_numpy(np.array(x.astype(mx.float32)))
        stage = Stage(0, left, self.torch_reducer, **self.stage_options)
        kept = choose_patches(Patches.of([cut], rows), stage)
        features = sizes = None
        if kept.features is not None:
            features = mx.array(kept.features.float().numpy()).astype(x.dtype)
        if merges and kept.weights is not None:
            sizes = kept.weights.long().numpy()
        return KeptRows(kept.patches.numpy(), features, sizes)
