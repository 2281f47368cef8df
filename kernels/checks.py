"""Input checks that the ops share. Every failure raises :class:`KernelError`."""

from collections.abc import Sequence

import torch
from tokencomp.kernels.errors import KernelError
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Row indices are 32 bits wide. The last tile of a launch reaches past the last row, so the limit
# leaves room for one tile above the largest row index.
MAX_ROWS = 2**31 - 2**16


def shape(name: str, tensor: Tensor, dims: int | tuple[int, ...], form: str) -> None:
    """Require `tensor` to have `dims` dimensions.

    `form` names the dimensions in the error message, for example ``(B, H, N, D)``.
    """
    allowed = (dims,) if isinstance(dims, int) else dims
    if tensor.dim() not in allowed:
        raise KernelError(f"{name} must have shape {form}; got {tuple(tensor.shape)}")


def floating(name: str, tensor: Tensor) -> None:
    """Require one of the floating-point dtypes in ``FLOATS``."""
    if tensor.dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise KernelError(f"{name} must be one of {names}; got {tensor.dtype}")


def integer(name: str, tensor: Tensor) -> None:
    """Require the dtype int32 or int64."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"{name} must be int32 or int64; got {tensor.dtype}")


def same_device(**tensors: Tensor | None) -> None:
    """Require all tensors that are not None to be on one device."""
    seen = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(seen.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in seen.items())
        raise KernelError(f"all tensors must be on one device; got {listing}. Move them with .to()")


def same_dtype(**tensors: Tensor) -> None:
    """Require all tensors to have one dtype."""
    if len({t.dtype for t in tensors.values()}) > 1:
        listing = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise KernelError(f"all tensors must have one dtype; got {listing}. Convert with .to()")


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


def count(name: str, value: int, low: int, high: int) -> None:
    """Require ``low <= value <= high``."""
    if not low <= value <= high:
        raise KernelError(f"{name} must be in [{low}, {high}]; got {value}")


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Require `value` to be one of `allowed`."""
    if value not in allowed:
        raise KernelError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")


def numbers(
    name: str, values: Tensor | None, size: int, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Return `values`, which must have the shape ``(size,)`` or be None, contiguous in `dtype`."""
    if values is None:
        return None
    if values.shape != (size,):
        raise KernelError(f"{name} must be ({size},); got {tuple(values.shape)}")
    return plain(values).to(dtype).contiguous()


def holds(condition: Tensor, message: str) -> None:
    """Require a condition that is a tensor of one element on the device.

    Reading it waits for the device: call it only where ``dispatch.checks_enabled``.
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


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` is summed: fp64 for fp64, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plain(tensor: Tensor) -> Tensor:
    """Return `tensor` without its gradient; a tensor that has none is returned as it is."""
    return tensor.detach() if tensor.requires_grad else tensor


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if its last dimension is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
