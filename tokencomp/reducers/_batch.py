"""Steps that reducers of whole batches share (`Reducer.reduce_batch`): all patches at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, starts_of

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


@functools.lru_cache(maxsize=8)
def random_ranks(seed: int, cells: int) -> Tensor:
    """A random number for each of so many cells, the same for a cell of any grid and device."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed))


def questions(patches: Patches, reducer: str, instead: str) -> tuple[Tensor, list[int], list[int]]:
    """Embeddings of the texts after the spans; spans of a prompt share one.

    They are unit embeddings of all texts, one text after the other, float32 (Σ m, d); m, the length
    of every text; which text each span has. `instead` is the option that does without.
    """
    queries = patches.batch.queries
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


def previous_similarity(patches: Patches, x: Tensor) -> Tensor:
    """Cosine of every patch with the same place of the frame before, float32, shape (patches,).

    -inf in first frames. Spans must be whole.
    """
    from tokencomp.kernels import nearest_previous_frame

    grids = patches.batch.grids
    firsts = starts_of([t for t, *_ in grids])[:-1]

    def of_stack(frames: HostIndex, _: Stack, rows: Tensor) -> Tensor:
        similarity: Tensor = nearest_previous_frame(rows[:, None])[:, 0]
        first = np.flatnonzero(np.isin(frames, firsts))  # the kernel knows of frame 0
        if len(first) == 1:
            return similarity
        return similarity.index_fill_(0, patches.table(first), -torch.inf)

    return by_stack(frame_lengths(patches), of_stack, x, limit=math.inf)


def frame_lengths(patches: Patches) -> list[int]:
    """Patches of every frame of all spans, which are whole."""
    return [h * w for t, h, w in patches.batch.grids for _ in range(t)]
