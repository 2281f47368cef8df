"""Runs of rows, such as spans or frames, as padded tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

K = TypeVar("K", bound=Hashable)
HostIndex = np.ndarray[Any, np.dtype[np.int64]]
Counts = Sequence[int] | HostIndex
PAIRS = 1 << 24  # pairs of rows that are compared at once
BLOCK = 1 << 24  # cosines computed at once
PADDING, SMALL = 4, 1 << 12  # most entries per entry of a run, and of any run


class Stack:
    """Runs of rows as a table (runs, longest); shorter runs repeat their last row.

    Every run has at least one row. Repeated rows change no maximum; where they would count,
    `masked` overwrites their values.
    """

    def __init__(self, firsts: Counts, lengths: Counts, device: torch.device) -> None:
        self.firsts, self.lengths, self.device = np.asarray(firsts), np.asarray(lengths), device
        self.longest = int(self.lengths.max())
        self.even = bool((self.lengths == self.longest).all())
        ends = self.firsts + self.lengths
        self._one_by_one = self.even and bool((self.firsts[1:] == ends[:-1]).all())

    def of(self, values: Tensor) -> Tensor:
        """The rows of values (n, …) in the table, shape (runs, longest, …); a view if possible."""
        if not self._one_by_one:
            return values[self.rows]
        first, stop = int(self.firsts[0]), int(self.firsts[-1]) + self.longest
        own = values if stop - first == len(values) else values[first:stop]
        table: Tensor = own.unflatten(0, (len(self.firsts), self.longest))
        return table

    def flat(self, table: Tensor) -> Tensor:
        """Values of the real rows of a table (runs, longest, …), concatenated over runs."""
        table = table.flatten(0, 1)
        return table if self.even else table[self.table(np.flatnonzero(real(self.lengths)))]

    @cached_property
    def rows(self) -> Tensor:
        """Row of every entry, int64, shape (runs, longest)."""
        return self.table(padded(self.firsts, self.lengths))

    def table(self, values: np.ndarray[Any, Any]) -> Tensor:
        """A host array as a tensor on the device."""
        return torch.from_numpy(values).to(self.device)


def by_stack(
    lengths: Counts,
    function: Callable[..., Tensor],
    *values: Tensor,
    keys: Sequence[Hashable] | None = None,
    limit: float | None = None,
) -> Tensor:
    """One value per row of `values` (n, …), computed for runs of similar length together.

    Runs of these `lengths`, at least one each, are consecutive. `function` gets the numbers of some
    runs, their `Stack` and the table of every one of `values`, and returns a table of results. Only
    runs of one of the `keys`, which have one length, are batched together: otherwise rounding of
    padded products would choose between copies that tie. `limit` is the number of pairs of rows of
    one run in memory at once, by default 2²⁴.
    """
    parts, order, starts, own = [], [], starts_of(lengths), np.asarray(lengths)
    groups = grouped(keys).values() if keys else [np.arange(len(own))]
    portion = (np.asarray(g)[p] for g in groups for p in portions(own[g] ** 2, limit or PAIRS))
    for runs in portion:
        stack = Stack(starts[runs], own[runs], values[0].device)
        parts.append(stack.flat(function(runs, stack, *map(stack.of, values))))
        if len(runs) == len(own):
            return parts[0]
        order.append(stack.flat(stack.rows))
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, torch.cat(order), joined)


def nearest(lengths: Sequence[int], x: Tensor, chosen: Tensor, counts: Sequence[int]) -> Tensor:
    """For every patch the chosen patch of its span with the largest cosine, int64, (n,).

    `x` (n, d) are features of spans of these `lengths`. `chosen`, int64 (k,), are ascending
    patches: `counts` of every span, at least one.
    """
    every = np.asarray(counts)
    firsts, unit = starts_of(every), normalize(x.float(), dim=1)

    def of_stack(spans: HostIndex, _: Stack, rows: Tensor) -> Tensor:
        picked = Stack(firsts[spans], every[spans], x.device)
        targets = picked.of(chosen)  # a shorter span repeats its last
        others, step = unit[targets].mT, max(1, BLOCK // targets.numel())
        best = [(part @ others).argmax(2) for part in rows.split(step, 1)]
        return targets.gather(1, torch.cat(best, 1))

    return by_stack(lengths, of_stack, unit)


def grouped(keys: Sequence[K]) -> dict[K, list[int]]:
    """Indices of the runs of every key, in order."""
    groups: dict[K, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups


def real(lengths: Counts) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mask of real entries of a table of runs, (runs, longest)."""
    own = np.asarray(lengths)[:, None]
    inside: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(own.max()) < own
    return inside


def masked(table: Tensor, lengths: Counts, value: float) -> Tensor:
    """Set padding entries of a table (runs, …, longest) to `value`."""
    if len(set(lengths)) == 1:
        return table
    outside = torch.from_numpy(~real(lengths)).to(table.device)
    return table.masked_fill_(outside.view(len(table), *[1] * (table.ndim - 2), -1), value)


def portions(entries: HostIndex, limit: float) -> Iterator[HostIndex]:
    """Batches of runs whose tables, padded to the longest, fit into memory together.

    Small runs come first, and indices ascend. No run is padded to more than 4 times its entries, or
    to 2¹².
    """
    order = np.argsort(entries, kind="stable")
    first = 0
    for place, most in enumerate(entries[order].tolist()):
        if most > max(PADDING * entries[order[first]], SMALL) or most * (place + 1 - first) > limit:
            if place > first:
                yield np.sort(order[first:place])
            first = place
    yield np.sort(order[first:])


def padded(firsts: Counts, lengths: Counts) -> HostIndex:
    """Rows of runs by first row and length, (runs, longest); shorter runs repeat their last row."""
    own = np.asarray(lengths)[:, None]
    rows: HostIndex = np.asarray(firsts)[:, None] + np.minimum(np.arange(own.max()), own - 1)
    return rows


def starts_of(lengths: Counts) -> HostIndex:
    """First row of every run, and the end of the last."""
    return np.cumsum([0, *lengths])


def rows_of(ends: HostIndex, numbers: Counts) -> HostIndex:
    """Rows of the runs `numbers`, concatenated; `ends` are `starts_of`."""
    return np.concatenate([np.arange(ends[number], ends[number + 1]) for number in numbers])
