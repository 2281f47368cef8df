"""Record what the kernels' launchers would launch, without a GPU."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.kernels.cases import OPS, Setup
from tokencomp.kernels import dispatch


@dataclass
class Launch:
    """A recorded launch."""

    kernel: JITFunction
    case: str
    dtype: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Recorder:
    """Stands in for a kernel and writes its launches down."""

    def __init__(self, kernel: JITFunction, note: Callable[..., None]) -> None:
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.note(self.kernel, arguments, options)


def triton_modules(op: str) -> list[ModuleType]:
    """The modules of an op that launch Triton kernels: `triton`, and its further parts."""
    package = f"tokencomp.kernels.{op}"
    names = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    return [importlib.import_module(f"{package}.{n}") for n in names if n.startswith("triton")]


@contextmanager
def recording(note: Callable[..., None], multiprocessors: int) -> Iterator[None]:
    """Replace all launches and pretend to be on a GPU."""
    with mock.patch.object(dispatch.Op, "_runs_triton", lambda op, x: True):
        patches = []
        for op in OPS:
            for module in triton_modules(op):
                for name, value in vars(module).items():
                    if isinstance(value, JITFunction):
                        patches.append(mock.patch.object(module, name, Recorder(value, note)))
                if hasattr(module, "multiprocessors"):
                    patches.append(
                        mock.patch.object(module, "multiprocessors", lambda device: multiprocessors)
                    )
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def record(setups: list[Setup], dtype: torch.dtype, multiprocessors: int) -> list[Launch]:
    """Every different launch of the cases."""
    launches: list[Launch] = []
    current = ""

    def note(kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = str(dtype).removeprefix("torch.")
        launches.append(Launch(kernel, current, name, arguments, options))

    random = mock.patch("benchmarks.kernels.cases.random_values", _uninitialised)
    with recording(note, multiprocessors), random:
        for setup in setups:
            case = setup(torch.device("cpu"), dtype, 1.0)
            current = case.name
            case.call()
    return launches


def specialise(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The compiler's input for a launch, from Triton's own argument binder."""
    kernel, backend = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = binder(*launch.arguments, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialisation, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return source, {**parsed.__dict__}


def _uninitialised(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Only shapes, strides and dtypes matter."""
    return torch.zeros((), device=device, dtype=dtype).expand(shape).contiguous()
