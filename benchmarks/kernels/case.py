"""What a benchmark of a kernel consists of."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencomp import kernels

OPS = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)


@dataclass
class Case:
    """One op at one size."""

    op: str
    name: str
    call: Callable[[], Any]
    bytes: float
    flops: float = 0
    eager: Callable[..., Any] | None = None  # None for loops in Python: the naive provider has them
    arguments: tuple[Any, ...] = ()  # of `eager`
    tensor_cores: bool = False
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)


Setup = Callable[[torch.device, torch.dtype, float], Case]


class Place(NamedTuple):
    """Where a case runs, and at what share of its sizes."""

    device: torch.device
    dtype: torch.dtype
    scale: float

    def values(self, *shape: int) -> Tensor:
        return random_values(*shape, device=self.device, dtype=self.dtype)


def prepared(make: Callable[..., Case]) -> Callable[..., Setup]:
    """Turn `make(place, ...)` into a function of all other arguments, which returns a `Setup`."""
    return lambda *sizes, **options: lambda *place: make(Place(*place), *sizes, **options)


def random_values(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)
