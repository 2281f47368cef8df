"""Ragged segments: consecutive runs of rows (frames or spans) that are described by lengths."""

import functools
import itertools
from collections.abc import Sequence

import torch
from tokencomp.kernels import checks
from tokencomp.kernels.errors import KernelError
from torch import Tensor


def lengths_of(name: str, segments: int | Sequence[int] | Tensor | None, rows: int) -> list[int]:
    """Convert a segment argument to a list of lengths that sum to `rows`.

    Parameters
    ----------
    name
        Name of the argument, for error messages.
    segments
        None for one segment of all rows, an int for equal segments of that many rows, or the
        number of rows of every segment.
    rows
        Number of rows that the segments must cover.

    Returns
    -------
    list of int
        Number of rows of every segment.

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


def spans_and_counts(
    k: int | Sequence[int], spans: int | Sequence[int] | Tensor | None, rows: int
) -> tuple[list[int], list[int]]:
    """Return the lengths of spans that cover `rows` rows, and how many rows each of them keeps.

    Parameters
    ----------
    k
        Rows to keep of every span, as one number for all or one for each.
    spans
        As `segments` of :func:`lengths_of`.

    Raises
    ------
    KernelError
        If the spans do not cover the rows, or `k` has another number of entries or exceeds a span.
    """
    lengths = lengths_of("spans", spans, rows)
    counts = [k] * len(lengths) if isinstance(k, int) else [int(c) for c in k]
    if len(counts) != len(lengths):
        raise KernelError(f"{len(counts)} values of k for {len(lengths)} spans")
    for count, length in zip(counts, lengths, strict=True):
        checks.count("k", count, 0, length)
    return lengths, counts


def fake_choice(x: Tensor, counts: Sequence[int], *_: object) -> Tensor:
    """The empty result, for tracing, of ops that choose `counts` rows of the spans of `x`."""
    return x.new_empty(sum(counts), dtype=torch.int64)


def same_shape(lengths: Sequence[int], counts: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Group the numbers of all spans by length and count (of frames by their grids), as batches."""
    grouped: dict[tuple[int, int], list[int]] = {}
    for span, shape in enumerate(zip(lengths, counts, strict=True)):
        grouped.setdefault(shape, []).append(span)
    return grouped


def groups(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Group the first rows of all segments by segment length: ``{length: [start, ...]}``."""
    grouped: dict[int, list[int]] = {}
    for start, length in zip(starts(lengths), lengths, strict=True):
        grouped.setdefault(length, []).append(start)
    return grouped


def starts(lengths: Sequence[int]) -> list[int]:
    """Return the first row of every segment."""
    return [0, *itertools.accumulate(lengths)][:-1]


def stacked(x: Tensor, first: Sequence[int], length: int) -> Tensor:
    """Stack the equally long segments that start at `first` as ``(segments, length, D)``.

    The result is a view if the segments lie one after the other in `x` ``(n, D)``, and a copy
    otherwise.
    """
    if list(first) == list(range(first[0], first[0] + len(first) * length, length)):
        return x[first[0] : first[0] + len(first) * length].unflatten(0, (len(first), length))
    return torch.stack([x[start : start + length] for start in first])


def table(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return integers as a tensor on `device`.

    The tensor is cached, because consecutive calls usually have the same shapes (the frames of one
    video, the layers of one model) and each copy from the host costs a synchronisation.
    """
    return _table(tuple(values), device, dtype)


@functools.lru_cache(maxsize=64)
def _table(values: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cached body of :func:`table`, with hashable values."""
    return torch.tensor(values, dtype=dtype, device=device)
