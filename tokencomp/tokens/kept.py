"""The result of a reducer: how it is checked, and how results of several spans are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import PlanError
from tokencomp.tokens.tokens import Tokens


@dataclass
class Kept:
    """The patches that a reducer keeps of `Tokens`.

    Attributes
    ----------
    rows : Tensor of int64, shape (k,)
        Rows of `Tokens.features`, ascending: of every span exactly its budget.
    features : Tensor, shape (k, d), or None
        New features of these rows, in any floating dtype; None: unchanged.
    weights : Tensor of float32, shape (k,), or None
        How many original tokens every kept row represents; None: unchanged.
    """

    rows: Tensor
    features: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def ascending(cls, rows: Tensor, features: Tensor, weights: Tensor) -> Kept:
        """`Kept` of rows in any order, with new features and weights in the same order."""
        rows, order = rows.sort()
        return cls(rows, features.index_select(0, order), weights.index_select(0, order))

    @classmethod
    def joined(cls, parts: Sequence[Kept], tokens: Tokens) -> Kept:
        """Join the results of all spans of `tokens`; `parts` has one entry per span.

        If only some of them merge, the others keep their features and weights.
        """
        rows = torch.cat([part.rows + at for part, at in zip(parts, tokens.starts, strict=True)])
        features = _joined([p.features for p in parts], tokens, rows, tokens.features)
        weights = _joined([p.weights for p in parts], tokens, rows, tokens.all_weights())
        return cls(rows, features, weights)

    def with_fixed(self, features: Tensor, patches: Tensor, fixed: Tensor) -> Kept:
        """Extend a choice among the rows `patches` of `features` (m, d) by the rows `fixed`.

        Fixed rows keep their features, and get weight 1 if there are weights: only patches are
        merged. `patches` and `fixed` are int64, ascending.
        """
        rows = torch.cat([fixed, patches.index_select(0, self.rows.to(patches.device))])
        rows, order = rows.sort()
        x, weights = self.features, self.weights
        if x is not None:
            x = torch.cat([features.index_select(0, fixed).to(x), x]).index_select(0, order)
        if weights is not None:
            weights = torch.cat([weights.new_ones(len(fixed)), weights]).index_select(0, order)
        return Kept(rows, x, weights)

    def check(self, tokens: Tokens, reducer: str, decides: bool = False) -> Kept:
        """Return this, if it keeps valid rows of `tokens`, of every span exactly its budget.

        A reducer that `decides` keeps any number of at least one, and changes no features.

        The values of the rows are checked on the CPU only: on a GPU the host would have to wait.

        Raises
        ------
        PlanError
            `reducer` returned something else.
        """
        fault = self._fault(tokens, decides)
        if fault:
            raise PlanError(
                f"reducer {reducer!r} returned {fault}. `reduce(tokens)` must return `Kept(rows)` "
                "with rows of `tokens.features`, int64, ascending, exactly as many of every span "
                "as its budget, and as many `features` and `weights`."
            )
        return self

    def _fault(self, tokens: Tokens, decides: bool) -> str:
        rows, budgets = self.rows, np.asarray(tokens.budgets)
        if getattr(rows, "dtype", None) != torch.int64 or rows.ndim != 1:
            return f"rows of {form(rows)}"
        k = len(rows) if decides else int(budgets.sum())
        wanted = {"rows": (k,), "features": (k, tokens.features.shape[1]), "weights": (k,)}
        for name, shape in wanted.items():
            values = getattr(self, name)
            if values is not None and getattr(values, "shape", None) != shape:
                return f"{name} of {form(values)} where shape {shape} was expected"
        if rows.device.type != "cpu":
            return ""
        kept, stops = rows.numpy(), np.cumsum(tokens.lengths)
        if (np.diff(kept) <= 0).any():
            return "rows that are not ascending"
        if len(kept) and (kept[0] < 0 or kept[-1] >= stops[-1]):
            return f"rows {kept[0]} … {kept[-1]} of {stops[-1]}"
        counts = np.diff(np.searchsorted(kept, stops), prepend=0)
        budgets = np.maximum(counts, 1) if decides else budgets
        wrong = np.flatnonzero(counts != budgets)
        if len(wrong):
            return f"{counts[wrong[0]]} rows of a span where {budgets[wrong[0]]} were requested"
        return ""


def form(values: object) -> str:
    """Shape and type of what should be a tensor, for messages."""
    if isinstance(values, Tensor):
        return f"shape {tuple(values.shape)} and type {values.dtype}"
    return f"type {type(values).__name__}"


def _joined(
    parts: Sequence[Tensor | None], tokens: Tokens, rows: Tensor, before: Tensor
) -> Tensor | None:
    """Concatenate the parts of all spans, with `before` in place of parts that are None."""
    if all(part is None for part in parts):
        return None
    pairs = zip(parts, before[rows].split(tokens.budgets), strict=True)
    return torch.cat([old if part is None else part.to(old) for part, old in pairs])
