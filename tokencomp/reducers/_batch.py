"""Steps that reducers of whole batches share (`Reducer.reduce_batch`): all patches at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.tokens.patches import HostIndex, Patches, by_group, grouped, rows_where, stacks
from tokencomp.tokens.spans import SpanBatch

__all__ = [
    "HostIndex",
    "Patches",
    "by_group",
    "distinct",
    "evenly",
    "grouped",
    "means",
    "min_max",
    "padded",
    "previous_similarity",
    "questions",
    "random_ranks",
    "ranked",
    "rows_of",
    "rows_where",
    "segment",
    "spread",
    "stacks",
    "starts_of",
]  # fmt: skip

BLOCK = 16  # rows that are summed one after the other


def segment(values: Tensor, lengths: Sequence[int], how: str) -> Tensor:
    """Sum, max or min ("sum", "max", "min") of every span of values (n, …); no span is empty."""
    if len(lengths) == 1:
        single: dict[str, Callable[..., Tensor]] = {
            "sum": torch.sum,
            "max": torch.amax,
            "min": torch.amin,
        }
        return single[how](values, dim=0, keepdim=True)
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


def means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean of every run of values (n, d) of these lengths, none empty.

    Runs are summed in blocks of 16 rows, and the blocks again, as `Tensor.mean` does on a CPU if d
    is a multiple of 32. All runs of up to 16 rows take one launch, those of up to 256 rows two, and
    no rounding depends on other runs.
    """
    counts, rows = torch.tensor(lengths, device=values.device), list(lengths)
    while max(rows) > 1:
        blocks = [min(BLOCK, n - first) for n in rows for first in range(0, n, BLOCK)]
        sizes = torch.tensor(blocks, device=values.device)
        values = torch.segment_reduce(values, "sum", lengths=sizes, unsafe=True)
        rows = [-(-n // BLOCK) for n in rows]
    return values / counts[:, None]


def ranked(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of values (n,), span by span, each by falling value; ties go to the lower row."""
    order = values.sort(descending=True, stable=True).indices
    if len(lengths) == 1:
        return order
    owners = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(values.device)
    return order[owners[order].sort(stable=True).indices]


def min_max(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """(v - min) / (max - min + 1e-6) of every run of values (n,) of these lengths, none empty."""
    low, high = (segment(values, lengths, how) for how in ("min", "max"))
    low, width = spread(torch.stack([low, high - low + 1e-6], 1), lengths).unbind(1)
    return (values - low) / width


def evenly(n: int, k: int) -> HostIndex:
    """Places floor((i + ½)·n/k) of k of n things."""
    steps = np.arange(k)
    return (2 * steps + 1) * n // (2 * max(k, 1))


@functools.lru_cache(maxsize=8)
def random_ranks(seed: int, cells: int) -> Tensor:
    """A random number for every cell of a grid, the same on every device."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed))


def questions(batch: SpanBatch, reducer: str, instead: str) -> tuple[Tensor, list[int], list[int]]:
    """Embeddings of the texts after the spans; spans of a prompt share one.

    Returns
    -------
    tuple
        Unit embeddings of all texts, one text after the other, float32 (Σ m, d); m, the length of
        every text; which text each span has.

    Raises
    ------
    ScoreError
        There is no text after a span. `instead` is the option that does without.
    """
    queries = batch.queries
    if queries is None or not all(map(len, queries)):
        raise ScoreError(
            f"{reducer} compares visual tokens with the text after them, and there is none. Put "
            f"the question after the image, or use {instead}."
        )
    texts, prompt = distinct(queries)
    return normalize(torch.cat(texts).float(), dim=1), [len(text) for text in texts], prompt


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors, once each, and which of them every one is: spans of a prompt share theirs."""
    by_id = {id(tensor): tensor for tensor in tensors}
    numbers = {key: number for number, key in enumerate(by_id)}
    return list(by_id.values()), [numbers[id(tensor)] for tensor in tensors]


def padded(firsts: Sequence[int] | HostIndex, lengths: Sequence[int] | HostIndex) -> HostIndex:
    """Rows of runs by first row and length, (runs, longest); short runs repeat their last row."""
    own = np.asarray(lengths)[:, None]
    rows: HostIndex = np.asarray(firsts)[:, None] + np.minimum(np.arange(own.max()), own - 1)
    return rows


def starts_of(lengths: Sequence[int]) -> HostIndex:
    """First row of every run of these lengths, and where the last one ends."""
    return np.cumsum([0, *lengths])


def rows_of(ends: HostIndex, numbers: Sequence[int] | HostIndex) -> HostIndex:
    """Rows of the runs of these numbers, one run after the other; `ends` are `starts_of`."""
    return np.concatenate([np.arange(ends[number], ends[number + 1]) for number in numbers])


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

    return by_group(patches, [(h, w) for _, h, w in grids], of_group, x)
