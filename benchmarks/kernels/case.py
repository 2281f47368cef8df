"""What a benchmark of a kernel consists of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """One op at one size."""

    op: str
    name: str
    call: Callable[[], Any]
    eager: Callable[..., Any] | None
    arguments: tuple[Any, ...]  # of `eager`
    flops: float
    bytes: float
    tensor_cores: bool
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)


Setup = Callable[[torch.device, torch.dtype, float], Case]


def random_values(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)
