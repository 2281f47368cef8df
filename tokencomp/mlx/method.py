"""What a patch of mlx-vlm compresses with: ratio or budget, and reducer, checked once."""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from tokencomp.errors import MissingDependencyError, OptionError
from tokencomp.mlx.selection import SELECT
from tokencomp.mlx.spans import Span
from tokencomp.plan.counts import Budget, Place, check_ratio, keep_count
from tokencomp.plan.options import one_amount


@dataclass(frozen=True)
class ChosenMethod:
    """A ratio, a reducer by name and its options; or a budget in tokens in place of the ratio.

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
        if not isinstance(self.reducer, str):
            raise OptionError(f"reducer={self.reducer!r}: expected a name, such as 'kcenter'.")
        self.torch_reducer  # noqa: B018  # refuses what cannot run, before any prompt

    @property
    def off(self) -> bool:
        """Whether nothing leaves."""
        return self.budget is None and not self.ratio

    @property
    def amount(self) -> str:
        """Ratio or budget in words."""
        return f"ratio {self.ratio}" if self.budget is None else f"budget {self.budget}"

    def left(self, place: Place) -> float:
        """Fraction that stays of a span."""
        if self.budget is None:
            return 1 - (self.ratio or 0.0)
        budget = Budget.of(self.budget)
        return budget.of_part(budget.left(place), place)

    @property
    def name(self) -> str:
        return "kcenter" if self.reducer == "auto" else self.reducer

    @functools.cached_property
    def torch_reducer(self) -> Any:
        """The reducer of `tokencomp.reducers`; None for those of `SELECT`."""
        if self.name in SELECT:
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
        """A number that differs between methods, for keys of caches."""
        text = json.dumps([self.ratio, self.budget, self.name, self.options], sort_keys=True)
        return zlib.crc32(text.encode())

    def kept(self, span: Span, place: Place, x: mx.array) -> tuple[np.ndarray, mx.array | None]:
        """Reduce one span of tokens x (n, d), whose `place` is that among the items of the prompt.

        Returns the offsets in the span that stay, ascending, line breaks among them, and their
        features, if the reducer merges; else None.
        """
        special = int(span.special.sum())
        keep = keep_count(len(x), self.left(place), special)
        if keep in (0, len(x)):
            return np.arange(keep), None
        if self.torch_reducer is not None:
            return self._by_torch(span, x, keep)
        patches = np.flatnonzero(~span.special)
        rows = x if not special else x[mx.array(patches)]
        chosen = SELECT[self.name](rows, span.grid, keep - special, **self.options)
        return np.sort(np.append(patches[chosen], np.flatnonzero(span.special))), None

    def _by_torch(self, span: Span, x: mx.array, keep: int) -> tuple[np.ndarray, mx.array | None]:
        import torch

        from tokencomp.reducers.base import reduced
        from tokencomp.tokens.tokens import Tokens

        rows, special = torch.from_numpy(np.array(x.astype(mx.float32))), span.special
        patches, fixed = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~special, special))
        modality: Any = span.modality
        tokens = Tokens(rows[patches], [span.grid], [keep - len(fixed)], modalities=[modality])
        kept = reduced(self.torch_reducer, tokens).with_fixed(rows, patches, fixed)
        merged = kept.features
        features = None if merged is None else mx.array(merged.float().numpy()).astype(x.dtype)
        return kept.rows.numpy(), features
