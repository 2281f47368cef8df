"""Ragged segments: consecutive runs of rows (frames, spans) given by their lengths."""

import functools
import itertools
from collections.abc import Sequence

import torch
from tokencomp.kernels.errors import KernelError
from torch import Tensor


def lengths_of(name: str, segments: int | Sequence[int] | Tensor | None, rows: int) -> list[int]:
    """Normalise a segment argument to a list of lengths that sum to `rows`.

    Parameters
    ----------
    name
        Argument name for error messages.
    segments
        None (one segment of all rows), an int (rows per segment), or the rows of every segment.
    rows
        Number of rows that the segments must cover.

    Raises
    ------
    KernelError
        If the segments do not cover exactly `rows` rows.
    """
    if segments is None:
        return [rows]
    if isinstance(segments, int):
        if segments <= 0 or rows % segments:
            raise KernelError(f"{name}={segments} rows per segment do not divide {rows} rows")
        return [segments] * (rows // segments)
    values = segments.tolist() if isinstance(segments, Tensor) else list(segments)
    lengths = [int(length) for length in values]
    if any(length < 0 for length in lengths) or sum(lengths) != rows:
        raise KernelError(
            f"{name} must be non-negative lengths that sum to {rows} rows; got "
            f"{len(lengths)} lengths with sum {sum(lengths)}"
        )
    return lengths


def groups(lengths: Sequence[int]) -> dict[int, list[int]]:
    """First rows of all segments, grouped by length: ``{length: [start, ...]}``."""
    grouped: dict[int, list[int]] = {}
    for start, length in zip(starts(lengths), lengths, strict=True):
        grouped.setdefault(length, []).append(start)
    return grouped


def starts(lengths: Sequence[int]) -> list[int]:
    """First row of every segment."""
    return [0, *itertools.accumulate(lengths)][:-1]


def stacked(x: Tensor, first: Sequence[int], length: int) -> Tensor:
    """The equally long segments that start at `first`, as ``(segments, length, D)``.

    A view when they lie one after the other, else a copy.
    """
    if list(first) == list(range(first[0], first[0] + len(first) * length, length)):
        return x[first[0] : first[0] + len(first) * length].unflatten(0, (len(first), length))
    return torch.stack([x[start : start + length] for start in first])


def table(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Integers as a device tensor, cached: frames of one video come in one shape for long."""
    return _table(tuple(values), device, dtype)


@functools.lru_cache(maxsize=64)
def _table(values: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    size = torch.tensor(lengths, dtype=torch.int32)
    end = size.cumsum(0, dtype=torch.int32)
    repeat = size.long()
    return (
        (end - size).repeat_interleave(repeat).to(device),
        end.repeat_interleave(repeat).to(device),
    )


def bounds(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Begin and end of the segment of every row: int32 ``(n,)`` each; cached."""
    return _bounds(tuple(lengths), device)
