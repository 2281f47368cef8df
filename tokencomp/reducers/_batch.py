"""Steps that reducers share: reductions over spans, complements, and texts of questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.tokens.tokens import Kept, Tokens, rows_where

T = TypeVar("T")
BLOCK = 16  # rows per partial sum of `means`


def complement(rows: Tensor, n: int) -> Tensor:
    """The rows of 0 … n - 1 that are not among the distinct `rows`, ascending, int64."""
    free = torch.ones(n, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
    return rows_where(free, n - len(rows))


def with_merged(x: Tensor, chosen: Tensor, merged: tuple[Tensor, Tensor, Tensor] | None) -> Kept:
    """Keep rows `chosen` of x (n, d) unchanged, and add `merged` (rows, features, weights)."""
    kept = chosen, x[chosen], x.new_ones(len(chosen))
    if merged is None:
        return Kept.ascending(*kept)
    return Kept.ascending(*(torch.cat(column) for column in zip(kept, merged, strict=True)))


def segment(values: Tensor, lengths: Sequence[int], how: str) -> Tensor:
    """Reduce values (n, …) over every span by `how`: "sum", "max" or "min". No span is empty."""
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
    """Repeat one value per span for every patch of the span; a single value is left to broadcast.

    `owners` is the span of every patch, if the caller has it already.
    """
    if len(lengths) == 1:
        return values
    if owners is None:
        owners = span_numbers(lengths, values.device)
    return values.index_select(0, owners)


def span_numbers(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The span of every row, int64, shape (n,)."""
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)


def means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean of every run of values (n, d) of the given lengths, none empty.

    Rows are summed in blocks of 16, then the block sums again, as `Tensor.mean` does on a CPU if d
    is a multiple of 32. So the rounding of a run does not depend on other runs, and runs of up to
    16 rows take one launch, those of up to 256 two.
    """
    counts, rows = torch.tensor(lengths, device=values.device), list(lengths)
    while max(rows) > 1:
        blocks = [min(BLOCK, n - first) for n in rows for first in range(0, n, BLOCK)]
        sizes = torch.tensor(blocks, device=values.device)
        values = torch.segment_reduce(values, "sum", lengths=sizes, unsafe=True)
        rows = [-(-n // BLOCK) for n in rows]
    return values / counts[:, None]


def ranked(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of values (n,) by falling value within every span, span by span; ties: the lower row
    first.
    """
    order = values.sort(descending=True, stable=True).indices
    if len(lengths) == 1:
        return order
    # A stable sort by span keeps the order of values within each span.
    spans = span_numbers(lengths, values.device)[order]
    return order[spans.sort(stable=True).indices]


def min_max(
    values: Tensor, lengths: Sequence[int], least: float = 0.0, owners: Tensor | None = None
) -> Tensor:
    """Min-max scaling (v - min + least) / (max - min + 1e-6) of every run of values (n,), none
    empty.
    """
    low, high = (segment(values, lengths, how) for how in ("min", "max"))
    width = high - low + 1e-6
    low, width = (spread(value, lengths, owners) for value in (low, width))
    return (values - low + least) / width


def questions(tokens: Tokens, reducer: str, instead: str) -> tuple[Tensor, list[int], list[int]]:
    """Unit embeddings of the text after every span. Spans of one prompt share a text.

    Returns the embeddings of all texts, float32 (Σ m, d); the length m of every text; and the
    number of the text of every span. `instead` is the fix that the error names if there is no text.
    """
    queries = tokens.queries
    if queries is None or not all(map(len, queries)):
        raise ScoreError(
            f"reducer {reducer!r} compares visual tokens with the text after them, and the prompt "
            f"has none. Put the question after the image, or use {instead}."
        )
    texts, prompt = distinct(queries)
    return normalize(torch.cat(texts).float(), dim=1), [len(text) for text in texts], prompt


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The distinct tensor objects, and for every input the number of its object."""
    by_id = {id(tensor): tensor for tensor in tensors}
    numbers = {key: number for number, key in enumerate(by_id)}
    return list(by_id.values()), [numbers[id(tensor)] for tensor in tensors]
