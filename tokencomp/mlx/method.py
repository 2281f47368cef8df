"""What a patch of mlx-vlm compresses with: ratio and reducer, checked once."""

from __future__ import annotations

import functools
import inspect
import json
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from tokencomp.errors import MissingDependencyError, OptionError
from tokencomp.mlx.selection import SELECT
from tokencomp.mlx.spans import Span
from tokencomp.plan.counts import check_ratio, keep_count


@dataclass(frozen=True)
class ChosenMethod:
    """A ratio, a reducer by name and its options.

    Raises
    ------
    RatioError, OptionError, UnknownNameError
        A ratio outside [0, 1), a reducer that does not exist or that reads more than features, or
        an option that it does not have.
    MissingDependencyError
        A reducer that needs torch, which is not installed.
    """

    ratio: float
    reducer: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if not isinstance(self.reducer, str):
            raise OptionError(f"reducer={self.reducer!r}: expected a name, such as 'kcentre'.")
        self.torch_reducer  # noqa: B018  # refuses what cannot run, before any prompt

    @property
    def name(self) -> str:
        return "kcentre" if self.reducer == "auto" else self.reducer

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
        text = json.dumps([self.ratio, self.name, self.options], sort_keys=True)
        return zlib.crc32(text.encode())

    def kept(self, span: Span, x: mx.array) -> tuple[np.ndarray, mx.array | None]:
        """Reduce one span.

        Parameters
        ----------
        x : array, shape (tokens of the span, d)

        Returns
        -------
        ndarray of int64
            Offsets in the span that stay, ascending, line breaks among them.
        array, shape (kept, d), or None
            Their features, if the reducer merges; else they stay as they are.
        """
        special = int(span.special.sum())
        keep = keep_count(len(x), 1 - self.ratio, special)
        if keep >= len(x):
            return np.arange(len(x)), None
        if self.torch_reducer is not None:
            return self._by_torch(span, x, keep)
        patches = np.flatnonzero(~span.special)
        if len(patches) != math.prod(span.grid):
            raise AssertionError(f"{len(patches)} patches in a grid of {span.grid}")
        rows = x if not special else x[mx.array(patches)]
        chosen = SELECT[self.name](rows, span.grid, keep - special, **self.options)
        return np.sort(np.append(patches[chosen], np.flatnonzero(span.special))), None

    def _by_torch(self, span: Span, x: mx.array, keep: int) -> tuple[np.ndarray, mx.array | None]:
        import torch

        from tokencomp.tokens.spans import VisualTokens

        rows = torch.from_numpy(np.array(x.astype(mx.float32)))
        special = torch.from_numpy(span.special.copy())
        kind: Any = span.kind
        result = self.torch_reducer.reduced(VisualTokens(rows, span.grid, special, kind=kind), keep)
        merged = result.merged
        own = None if merged is None else mx.array(merged.float().numpy()).astype(x.dtype)
        return result.keep.numpy(), own
