"""Arguments that the ops share: checks of tensors, and the segments that lengths describe.

Segments are consecutive runs of rows, such as frames and spans. Every failed check raises
:class:`KernelError`.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.kernels.errors import KernelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE_FLOATS = (torch.float32, torch.float64)
TRITON_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
# Row indices are 32 bits wide. The last tile of a launch reaches past the last row, so the limit
# leaves room for one tile above the largest row index.
MAX_ROWS = 2**31 - 2**16


def operand(
    name: str, tensor: Tensor, form: str, dtypes: Sequence[torch.dtype] | None = FLOATS
) -> None:
    """Require the dimensions that `form` names, such as ``(B, H, N, D)``, and one of `dtypes`.

    All dimensions but the last count rows, which 32-bit indices must reach. None allows all dtypes.
    """
    shape = tuple(tensor.shape)
    if len(shape) != form.count(", ") + 1:
        raise KernelError(f"{name} must have shape {form}; got {shape}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise KernelError(
            f"{name} must be one of {names}; got {tensor.dtype}. Convert it with .to()"
        )
    if math.prod(shape[:-1]) > MAX_ROWS:
        raise KernelError(
            f"{name} {shape} has more rows than 32-bit indices reach ({MAX_ROWS}): split the call "
            "into smaller ones"
        )


def heads(**tensors: Tensor) -> None:
    """Require queries, keys and values ``(B, heads, length, D)`` of one dtype."""
    for name, tensor in tensors.items():
        operand(name, tensor, "(B, heads, length, D)")
    if len({t.dtype for t in tensors.values()}) > 1:
        listing = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise KernelError(f"all tensors must have one dtype; got {listing}. Convert with .to()")


def vectors(x: Tensor, **given: tuple[Tensor | None, int, torch.dtype]) -> list[Tensor | None]:
    """Return the vectors that are given, each as (values, size, dtype), contiguous and detached.

    Each must have the shape ``(size,)``, be on the device of `x` and, if its `dtype` is an integer,
    hold integers.
    """
    result = []
    for name, (values, size, dtype) in given.items():
        if values is not None:
            if values.shape != (size,):
                raise KernelError(f"{name} must be ({size},); got {tuple(values.shape)}")
            if dtype in INTEGERS and values.dtype not in INTEGERS:
                raise KernelError(f"{name} must be int32 or int64; got {values.dtype}")
            if values.device != x.device:
                raise KernelError(
                    f"{name} is on {values.device}, but the rows are on {x.device}. Move it with "
                    ".to()"
                )
            values = values.detach() if values.requires_grad else values
            values = values.to(dtype).contiguous()
        result.append(values)
    return result


def same_device(**tensors: Tensor | None) -> None:
    """Require all tensors that are not None to be on one device."""
    seen = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(seen.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in seen.items())
        raise KernelError(f"all tensors must be on one device; got {listing}. Move them with .to()")


def triton_dtype(name: str, tensor: Tensor) -> None:
    """Require a dtype that the Triton kernels compute with."""
    if tensor.dtype not in TRITON_FLOATS:
        raise KernelError(
            f"{name} is {tensor.dtype}; the Triton kernels take float16, bfloat16 and float32. "
            "Convert it, or set TOKENCOMP_KERNELS=naive"
        )


def int32_sizes(**sizes: int) -> None:
    """Require row counts (or products of them) that fit the 32-bit row indices of the kernels."""
    for name, size in sizes.items():
        if size > MAX_ROWS:
            raise KernelError(
                f"{name}={size} does not fit 32-bit row indices (at most {MAX_ROWS}): split the "
                "call into smaller ones"
            )


def triton_heads(q: Tensor, largest: int) -> None:
    """Require queries ``(B, H, N, D)`` that a Triton attention kernel accepts.

    `largest` is the largest head dimension D that the kernel compiles for.
    """
    triton_dtype("q", q)
    grid_size("batch x heads", q.shape[0] * q.shape[1])
    if q.shape[3] > largest:
        raise KernelError(
            f"head dimension {q.shape[3]} is above {largest}, the largest the Triton kernel "
            "compiles for; set TOKENCOMP_KERNELS=naive"
        )


def grid_size(name: str, size: int) -> None:
    """Require a count that fits the second dimension of a CUDA grid (65535)."""
    if size > 65535:
        raise KernelError(
            f"{name}={size} is above 65535, the limit of one launch: split the batch, or set "
            "TOKENCOMP_KERNELS=naive"
        )


def holds(condition: Tensor, message: str) -> None:
    """Require a condition that is a tensor of one element on the device.

    Reading it waits for the device: only the checks of a ``dispatch.Op`` call it.
    """
    if not bool(condition):
        raise KernelError(message)


def no_nan(values: Tensor, message: str) -> None:
    """Require that no value is NaN; as :func:`holds`, it waits for the device."""
    if bool(values.isnan().any()):
        raise KernelError(message)


def cosines(values: Tensor) -> None:
    """Require cosines that features without NaN and infinities have."""
    no_nan(values, "x has NaN or infinite features: cosine is undefined")


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if its last dimension is contiguous, otherwise a contiguous copy."""
    # A dimension of one entry may have any stride; pointers of kernels step by 1 in the last one.
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


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
    # Lengths in a tensor on a GPU make the host wait; reducers pass lists.
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
        if not 0 <= count <= length:
            raise KernelError(f"k must be in [0, {length}]; got {count}")
    return lengths, counts


def fake_choice(x: Tensor, counts: Sequence[int], *_: object) -> Tensor:
    """The empty result, for tracing, of ops that choose `counts` rows of the spans of `x`."""
    return x.new_empty(sum(counts), dtype=torch.int64)


def starts(lengths: Sequence[int]) -> list[int]:
    """Return the first row of every segment."""
    # lengths 3 0 2 -> 0 3 3; with a further length 0 the end of the last one too: 0 3 3 5
    return [0, *itertools.accumulate(lengths)][:-1]


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
