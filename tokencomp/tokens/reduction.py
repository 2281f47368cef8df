"""What a reducer returns, and how its result is checked, split and joined."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import PlanError
from tokencomp.tokens.spans import SpanBatch, VisualTokens


@dataclass
class Reduction:
    """What a reducer returns for one span, or for a batch of spans.

    Attributes
    ----------
    keep : Tensor of int64, shape (k,)
        Rows of `features` that stay, ascending; k is exactly the requested count. Rows of a batch
        count over all of its spans.
    merged : Tensor, shape (k, d), or None
        New content of the kept rows; None keeps them as they are.
    sizes : Tensor of float32, shape (k,), or None
        How many original tokens every kept row stands for.
    """

    keep: Tensor
    merged: Tensor | None = None
    sizes: Tensor | None = None

    def check(self, tokens: VisualTokens, keep: int, reducer: str) -> Reduction:
        """Return this reduction of `tokens` if it keeps exactly `keep` valid rows.

        The values of the rows are checked on the CPU only: on a GPU the host would have to wait.

        Raises
        ------
        PlanError
            `reducer` returned another number of rows, rows that are not ascending row numbers of
            `tokens`, or fewer than all special tokens.
        """
        rows = {t.shape[0] for t in (self.keep, self.merged, self.sizes) if t is not None}
        if rows != {keep}:
            raise PlanError(
                f"reducer {reducer!r} returned {', '.join(map(str, sorted(rows)))} rows of a span "
                f"where {keep} were requested. `reduce(tokens, keep)` must return exactly `keep` "
                "rows, special tokens among them, and as many of `merged` and `sizes`."
            )
        fault = self._fault(tokens)
        if fault:
            raise PlanError(
                f"reducer {reducer!r} returned {fault}. `keep` must be row numbers of "
                "`tokens.features`, int64, ascending, all special tokens among them."
            )
        return self

    def check_batch(self, batch: SpanBatch, keeps: Sequence[int], reducer: str) -> Reduction:
        """Return this reduction of `batch` if every span keeps exactly its number of rows.

        Like `check`; which span a row belongs to is seen on the CPU only.
        """
        total = sum(keeps)
        rows = {t.shape[0] for t in (self.keep, self.merged, self.sizes) if t is not None}
        if rows == {total} and self.keep.dtype == torch.int64:
            if self.keep.device.type != "cpu":
                return self
            kept = self.keep.numpy()
            stops, lengths = np.cumsum(batch.lengths), np.asarray(batch.lengths)
            first, stop = np.repeat(stops - lengths, keeps), np.repeat(stops, keeps)
            inside = ((kept >= first) & (kept < stop)).all() and (np.diff(kept) > 0).all()
            special = batch.special
            if inside and (special is None or special.numpy()[kept].sum() == sum(batch.fixed)):
                return self
        parts = zip(batch.spans(), self.split(batch, keeps), keeps, strict=True)
        for tokens, part, keep in parts:
            part.check(tokens, keep, reducer)
        raise PlanError(f"reducer {reducer!r} returned rows that no span of its batch has.")

    def split(self, batch: SpanBatch, keeps: Sequence[int]) -> list[Reduction]:
        """The reductions of the spans of `batch`, which keep `keeps` rows."""
        parts = []
        stops = itertools.accumulate(keeps)
        for start, stop, keep in zip(batch.starts, stops, keeps, strict=True):
            rows = slice(stop - keep, stop)
            merged = None if self.merged is None else self.merged[rows]
            sizes = None if self.sizes is None else self.sizes[rows]
            parts.append(Reduction(self.keep[rows] - start, merged, sizes))
        return parts

    @classmethod
    def join(cls, parts: Sequence[Reduction], batch: SpanBatch) -> Reduction:
        """The reduction of `batch` whose spans have the reductions `parts`.

        Where only some of them merge, the others keep features and sizes as they are.
        """
        keep = torch.cat([r.keep + start for r, start in zip(parts, batch.starts, strict=True)])
        merged = sizes = None
        if any(r.merged is not None for r in parts):
            rows = zip(parts, batch.spans(), strict=True)
            merged = torch.cat(
                [t.features[r.keep] if r.merged is None else r.merged for r, t in rows]
            )
        if any(r.sizes is not None for r in parts):
            before = batch.sizes
            if before is None:
                before = torch.ones(sum(batch.lengths), device=keep.device)
            known = zip(parts, before[keep].split([len(r.keep) for r in parts]), strict=True)
            sizes = torch.cat([own if r.sizes is None else r.sizes.to(own) for r, own in known])
        return cls(keep, merged, sizes)

    def _fault(self, tokens: VisualTokens) -> str:
        """What is wrong with the kept rows, or ""."""
        rows = self.keep
        if rows.dtype != torch.int64 or rows.ndim != 1:
            return f"rows of shape {tuple(rows.shape)} and type {rows.dtype}"
        if rows.device.type != "cpu" or not len(rows):
            return ""
        if bool((rows.diff() <= 0).any()):
            return "rows that are not ascending"
        if rows[0] < 0 or rows[-1] >= len(tokens):
            return f"rows {int(rows[0])} … {int(rows[-1])} of {len(tokens)}"
        lost = int(tokens.special.sum()) - int(tokens.special[rows].sum())
        return f"rows without {lost} of the special tokens" if lost else ""
