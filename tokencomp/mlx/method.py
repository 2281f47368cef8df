"""Method of a patch of mlx-vlm: ratio or budget, and reducer, checked once."""

from __future__ import annotations

import inspect
import json
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from tokencomp.errors import MissingDependencyError, OptionError
from tokencomp.method import Method
from tokencomp.mlx.selection import SELECT, merged
from tokencomp.mlx.spans import Span
from tokencomp.plan.counts import BudgetShare
from tokencomp.plan.plan import keep_count
from tokencomp.serving.engines import ENGINES


class KeptRows(NamedTuple):
    """Kept rows of a span.

    `offsets` int64 (k,) in the span, ascending, including line breaks; `features` (k, d), if others
    are merged into them; `sizes` int64 (k,), the tokens that each row represents, if rows have
    weights.
    """

    offsets: np.ndarray
    features: mx.array | None = None
    sizes: np.ndarray | None = None


@dataclass(frozen=True)
class MlxMethod(Method):
    """A method of one stage, before the first layer. Reducers of `SELECT` need no torch.

    Raises the errors of `Method`; also refused are what `ENGINES` refuses, and what needs torch
    where it is not installed (`MissingDependencyError`).
    """

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            ENGINES["mlx"].fit(self)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"reducer {self.reducer!r} needs {error.name}, which is not installed. Without it "
                f"MLX has {', '.join(SELECT)}."
            ) from None
        self._assign(**self.options_in_force)
        if self.torch_reducer is None:
            allowed = list(inspect.signature(SELECT[self.name]).parameters)[3:]
            if wrong := sorted(set(self.options) - set(allowed)):
                raise OptionError(
                    f"reducer {self.name!r} has no option {wrong[0]!r} on MLX. "
                    f"Allowed: {', '.join(allowed) or 'none'}."
                )

    @property
    def name(self) -> str:
        return self.reducer if isinstance(self.reducer, str) else self.reducer.name

    @property
    def names_reducer(self) -> bool:
        """Whether the reducer is one of `tokencomp.reducers`; else `SELECT` and `merged` do all."""
        return self.name not in SELECT or not self.stage_options.keys() <= {"merge"}

    @property
    def torch_reducer(self) -> Any:
        return self.built_reducer if self.names_reducer else None

    def left(self, share: BudgetShare) -> float:
        """Fraction of a span that is kept."""
        budget = self.built_budget
        if budget is None:
            return 1 - self.ratio
        return budget.of_part(budget.left(share), share)

    @property
    def salt(self) -> int:
        """A number that differs between methods, for cache keys."""
        values = [self.ratio, self.budget, self.name, self.options, self.stage_options]
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
