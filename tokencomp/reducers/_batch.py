"""Steps that reducers of whole batches share (`Reducer.reduce_batch`): all patches at once.

Lengths, budgets and places of grids are numbers on the host. What follows from them alone is
computed there and moves to the device as one table, so that the number of launches does not depend
on the number of spans.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.reducers._rows import check_whole
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch

K = TypeVar("K", bound=Hashable)
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Patches:
    """The patches of a batch: all of its tokens but the special ones.

    Attributes
    ----------
    lengths, budgets
        Patches of every span, and how many of them stay.
    rows : Tensor of int64, shape (patches,), or None
        Their rows in the batch, ascending; None: all rows are patches.
    special : Tensor of int64, shape (special tokens,), or None
        The other rows.
    """

    batch: SpanBatch
    lengths: list[int]
    budgets: list[int]
    rows: Tensor | None = None
    special: Tensor | None = None

    @classmethod
    def of(cls, batch: SpanBatch, keeps: Sequence[int]) -> Patches:
        """The patches of `batch`, of whose tokens `keeps` stay."""
        lengths = [n - fixed for n, fixed in zip(batch.lengths, batch.fixed, strict=True)]
        budgets = [keep - fixed for keep, fixed in zip(keeps, batch.fixed, strict=True)]
        if batch.special is None:
            return cls(batch, lengths, budgets)
        # Sorting instead of `nonzero`, whose length the host would have to read.
        order = batch.special.to(torch.uint8).sort(stable=True).indices
        return cls(batch, lengths, budgets, order[: sum(lengths)], order[sum(lengths) :])

    @classmethod
    def whole(cls, batch: SpanBatch, keeps: Sequence[int], reducer: str) -> Patches:
        """`of` for spans of which no patch is missing: t·h·w rows in raster order each.

        Raises
        ------
        PlanError
            An earlier stage has already dropped tokens of a span.
        """
        patches = cls.of(batch, keeps)
        for grid, length in zip(batch.grids, patches.lengths, strict=True):
            check_whole(grid, length, reducer)
        return patches

    def of_patches(self, values: Tensor) -> Tensor:
        """The rows of `values` (n, …) that belong to patches."""
        return values if self.rows is None else values.index_select(0, self.rows)

    @property
    def features(self) -> Tensor:
        """Features of the patches, shape (patches, d)."""
        return self.of_patches(self.batch.features)

    @property
    def device(self) -> torch.device:
        return self.batch.features.device

    @property
    def starts(self) -> list[int]:
        """First patch of every span."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    def table(self, values: Any) -> Tensor:
        """Integers on the host as a tensor on the device, int64."""
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device)

    def owners(self) -> Tensor:
        """The span of every patch, int64, shape (patches,)."""
        return self.table(np.repeat(np.arange(len(self.lengths)), self.lengths))

    def sizes(self) -> Tensor:
        """How many original tokens every patch stands for, float32, shape (patches,)."""
        if self.batch.sizes is None:
            return torch.ones(sum(self.lengths), device=self.device)
        return self.of_patches(self.batch.sizes)

    def host_cells(self) -> list[Places]:
        """Raster index in the uncompressed grid of the patches of every span, on the host.

        Read from the device only where tokens are missing.
        """
        if self.batch.index is None:
            return [np.arange(length) for length in self.lengths]
        cells = self.cells().cpu().numpy()
        return np.split(cells, np.cumsum(self.lengths[:-1]))

    def per_frame(self) -> list[list[int]]:
        """Patches left of every frame of every span; read from the device if some are missing."""
        frames = [[h * w] * t for t, h, w in self.batch.grids]
        if self.batch.index is None:
            return frames
        first = list(itertools.accumulate(map(len, frames), initial=0))
        areas = np.repeat([h * w for _, h, w in self.batch.grids], self.lengths)
        frame = self.cells() // self.table(areas) + self.table(np.repeat(first[:-1], self.lengths))
        counts = torch.bincount(frame, minlength=first[-1]).tolist()
        return [counts[a:b] for a, b in itertools.pairwise(first)]

    def cells(self) -> Tensor:
        """Raster index in the uncompressed grid of every patch, int64, shape (patches,)."""
        offsets = self.of_patches(self.batch.offsets)
        if self.batch.special is None:
            return offsets
        # Special tokens never leave, so those before a patch are counted on the live tokens.
        before = self.batch.special.cumsum(0)
        others = list(itertools.accumulate(self.batch.fixed[:-1], initial=0))
        return offsets - self.of_patches(before - self.batch.per_row(others))

    def kept(self, chosen: Tensor) -> Reduction:
        """The reduction that keeps all special tokens and the patches `chosen`, ascending."""
        if self.rows is None or self.special is None:
            return Reduction(chosen)
        rows = self.rows.index_select(0, chosen.to(self.device))
        return Reduction(torch.cat([self.special, rows]).sort().values)

    def replaced(self, chosen: Tensor, x: Tensor, sizes: Tensor) -> Reduction:
        """The reduction that keeps all special tokens and puts new patches at `chosen`.

        Parameters
        ----------
        chosen : Tensor of int64, shape (k,)
            Patches whose places the new ones take, in any order.
        x : Tensor, shape (k, d)
            Features of the new patches.
        sizes : Tensor of float32, shape (k,)
            How many original tokens each of them stands for.
        """
        if self.rows is not None and self.special is not None:
            chosen = torch.cat([self.special, self.rows.index_select(0, chosen)])
            x = torch.cat([self.batch.features.index_select(0, self.special), x])
            sizes = torch.cat([sizes.new_ones(len(self.special)), sizes])
        keep, order = chosen.sort()
        return Reduction(keep, x.index_select(0, order), sizes.index_select(0, order))


def grouped(keys: Sequence[K]) -> dict[K, list[int]]:
    """Numbers of the spans of every key, in order."""
    groups: dict[K, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups


def stacks(patches: Patches, keys: Sequence[Hashable]) -> Iterator[tuple[list[int], Tensor | None]]:
    """Groups of spans with one key, and the patches of each group (None: all patches)."""
    groups = grouped(keys)
    starts = patches.starts
    for members in groups.values():
        rows = [np.arange(starts[m], starts[m] + patches.lengths[m]) for m in members]
        yield members, None if len(groups) == 1 else patches.table(np.concatenate(rows))


def by_group(
    patches: Patches,
    keys: Sequence[Hashable],
    x: Tensor,
    function: Callable[[list[int], Tensor], Tensor],
) -> Tensor:
    """One value per patch, computed for the spans of every key together.

    Parameters
    ----------
    x : Tensor, shape (patches, …)
    function
        (spans, rows of x) → values of these rows, (rows,).
    """
    parts, order = [], []
    for members, rows in stacks(patches, keys):
        if rows is None:
            return function(members, x)
        parts.append(function(members, x.index_select(0, rows)))
        order.append(rows)
    values = torch.cat(parts)
    return torch.empty_like(values).index_copy_(0, torch.cat(order), values)


def segment(values: Tensor, lengths: Sequence[int], how: str) -> Tensor:
    """Sum, max or min ("sum", "max", "min") of every span of values (n,); no span is empty."""
    if len(lengths) == 1:
        single: dict[str, Callable[[Tensor], Tensor]] = {
            "sum": torch.sum,
            "max": torch.max,
            "min": torch.min,
        }
        return single[how](values)[None]
    counts = torch.tensor(list(lengths), device=values.device)
    return torch.segment_reduce(values, how, lengths=counts, unsafe=True)


def spread(values: Tensor, lengths: Sequence[int], owners: Tensor | None = None) -> Tensor:
    """One value per span as one per patch; a single value is left to broadcast."""
    if len(lengths) == 1:
        return values
    if owners is None:
        rows = np.repeat(np.arange(len(lengths)), lengths)
        owners = torch.from_numpy(rows).to(values.device)
    return values.index_select(0, owners)


def min_max(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """(v - min) / (max - min + 1e-6) of every run of values (n,) of these lengths, none empty."""
    low, high = (segment(values, lengths, how) for how in ("min", "max"))
    low, width = spread(torch.stack([low, high - low + 1e-6], 1), lengths).unbind(1)
    return (values - low) / width


def evenly(n: int, k: int) -> Places:
    """Places floor((i + ½)·n/k) of k of n things."""
    steps = np.arange(k)
    return (2 * steps + 1) * n // (2 * max(k, 1))


@functools.lru_cache(maxsize=8)
def random_ranks(seed: int, cells: int) -> Tensor:
    """A random number for every cell of a grid, the same on every device."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed))


def top_k_of_spans(
    scores: Tensor, batch: SpanBatch, keeps: Sequence[int], patches: Patches | None = None
) -> Reduction:
    """The best-scored tokens of every span, all special ones among them; ties to the lower row.

    Parameters
    ----------
    scores : Tensor of float32, without NaN
        Of all tokens of the batch, or of its `patches` where they are given.
    """
    from tokencomp.kernels import topk_stable

    if patches is not None:
        return patches.kept(topk_stable(scores, patches.budgets, spans=patches.lengths))
    if batch.special is not None:
        scores = scores.masked_fill(batch.special, torch.inf)
    return Reduction(topk_stable(scores, keeps, spans=batch.lengths))


def questions(batch: SpanBatch, reducer: str, instead: str) -> list[Tensor]:
    """Unit embeddings of the text after every span, float32, (m, d); spans of a prompt share one.

    Raises
    ------
    ScoreError
        There is no text after a span. `instead` is the option that does without.
    """
    queries = batch.queries
    if queries is None or any(q is None or not len(q) for q in queries):
        raise ScoreError(
            f"{reducer} compares visual tokens with the text after them, and there is none. Put "
            f"the question after the image, or use {instead}."
        )
    texts = {id(q): normalize(q.float(), dim=1) for q in queries if q is not None}
    return [texts[id(query)] for query in queries]


def previous_similarity(patches: Patches, x: Tensor) -> Tensor:
    """Cosine of every patch with the same place of the frame before, float32, shape (patches,).

    -inf in first frames. Spans must be whole; those with frames of one size are compared together.
    """
    from tokencomp.kernels import nearest_previous_frame

    grids = patches.batch.grids

    def of_group(members: list[int], rows: Tensor) -> Tensor:
        frames, height, width = [grids[m][0] for m in members], *grids[members[0]][1:]
        similarity: Tensor = nearest_previous_frame(rows.view(sum(frames), height, width, -1))
        if len(members) > 1:
            first = patches.table(list(itertools.accumulate(frames[:-1], initial=0)))
            similarity = similarity.index_fill(0, first, -torch.inf)
        return similarity.flatten()

    return by_group(patches, [(h, w) for _, h, w in grids], x, of_group)
