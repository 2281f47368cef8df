"""Choice of the implementation of an op: plain PyTorch (``naive``) or Triton.

The environment variable ``TOKENCOMP_KERNELS`` decides:

``auto`` (default)
    Triton runs for CUDA tensors if Triton can be imported, the device has compute capability 8.0 or
    newer, and the op has passed the self-test of the card (:mod:`tokencomp.kernels.selftest`).
    Plain PyTorch runs everywhere else.
``naive``
    Plain PyTorch always runs.
``triton``
    Triton always runs, without a self-test, and an error is raised where it cannot. CPU tensors
    are accepted under Triton's interpreter (``TRITON_INTERPRET=1``), which is how the kernels are
    tested without a GPU.

Checks of values (NaN scores, indices out of range) need one host round trip on a GPU. They are on
by default and are skipped while a CUDA graph is captured. ``TOKENCOMP_KERNELS_CHECK=0`` turns them
off.
"""

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from tokencomp.kernels import selftest
from tokencomp.kernels.errors import KernelError

MODES = ("auto", "naive", "triton")
MIN_TRITON = (3, 3)  # the first release that accepts tuples as kernel arguments
# Ampere, whose tensor cores are the first with products of bf16 and tf32.
MIN_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)
_assumed = threading.local()

BODIES: dict[str, Callable[..., Any]] = {}
"""What the custom op of every :class:`Op` runs, by its name; see :func:`plain`."""


@functools.cache
def mode(value: str) -> str:
    """Return the mode that a value of ``TOKENCOMP_KERNELS`` requests.

    Raises
    ------
    KernelError
        If the value is not one of ``MODES``.
    """
    value = value.strip().lower() or "auto"
    if value not in MODES:
        raise KernelError(
            f"TOKENCOMP_KERNELS={value!r} is not known; allowed: {', '.join(MODES)}. "
            "Unset it for the default, 'auto'."
        )
    return value


@functools.cache
def triton_problem() -> str | None:
    """Return why Triton cannot be used in this process, or None if it can."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:
        return f"triton cannot be imported ({error}); install it with `pip install triton`"
    version = getattr(triton, "__version__", "0")
    if TorchVersion(version) < MIN_TRITON:  # type: ignore[operator]  # it compares with tuples
        minimum = ".".join(map(str, MIN_TRITON))
        return f"triton {version} is too old; install triton>={minimum}"
    return None


def interpreting() -> bool:
    """Whether Triton's CPU interpreter is on (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def which(tensor: Tensor) -> str:
    """Return the implementation, ``"naive"`` or ``"triton"``, of an op with main operand `tensor`.

    Raises
    ------
    KernelError
        If ``TOKENCOMP_KERNELS=triton`` and Triton cannot run on the tensor's device.
    """
    if getattr(_assumed, "plain", False):
        return "naive"
    requested = mode(os.environ.get("TOKENCOMP_KERNELS", ""))
    if requested == "naive" or (requested == "auto" and tensor.device.type == "cpu"):
        return "naive"
    problem = triton_problem() or _device_problem(tensor.device)
    if problem is None:
        return "triton"
    if requested == "triton":
        raise KernelError(
            f"TOKENCOMP_KERNELS=triton, but {problem}. "
            "Use TOKENCOMP_KERNELS=auto to run plain PyTorch where Triton cannot run."
        )
    if tensor.device.type == "cuda":
        _warn_once(problem)
    return "naive"


class Op:
    """An op: its plain form, its Triton form, and a torch custom op that runs one of them.

    The custom op is for calls that are traced. Others run a form directly and spend no time in
    ``torch.library``.

    Parameters
    ----------
    name
        Name of the custom op, and of the Triton form in the module ``triton`` next to `naive`,
        which is imported when it first runs.
    naive
        The plain form. All forms have its arguments, the main operand first.
    fake
        Returns empty results of the right shapes for the arguments.
    check, check_result
        Check the values of the arguments, and of the result, if checks are on.
    differentiable
        Whether autograd records the plain form where a gradient is needed. Otherwise results have
        no gradient.
    """

    def __init__(
        self,
        name: str,
        naive: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None] | None = None,
        check_result: Callable[[Any], None] | None = None,
        differentiable: bool = False,
    ) -> None:
        self.name, self.naive, self._check, self._check_result = name, naive, check, check_result
        self._triton_form = f"{naive.__module__}.triton", name
        self._differentiable = differentiable

        @functools.wraps(naive)
        def body(*args: Any) -> Any:
            return self._run(args)

        BODIES[name] = body
        selftest.OPS.append(name)
        self._custom_op = torch.library.custom_op(f"tokencomp::{name}", body, mutates_args=())
        self._custom_op.register_fake(fake)

    def __call__(self, *args: Any, trusted: bool = False) -> Any:
        """Run the op; the values of `trusted` arguments are not checked."""
        if torch.is_grad_enabled() and _any_requires_grad(args):
            # Ops that move or average rows; choices of rows have no gradient.
            if self._differentiable:
                return self.naive(*args)
            with torch.no_grad():
                return self(*args, trusted=trusted)
        x = args[0]
        # A compiler, a dispatch mode or a fake tensor must see the op as one call.
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or type(x) is not Tensor
            or x.is_meta
        ):
            # The custom op has no argument `trusted`; `exact` turns its checks off for this thread.
            if trusted and not torch.compiler.is_compiling():
                with exact(x):
                    return self._custom_op(*args)
            return self._custom_op(*args)
        return self._run(args, trusted)

    def _run(self, args: tuple[Any, ...], trusted: bool = False) -> Any:
        """Run the form for the main operand without autocast, and check values around it."""
        x = args[0]
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # rounding could select other rows
                return self._run(args, trusted)
        form = self._triton if self._runs_triton(x) else self.naive
        # A check reads a value on the host, which a captured CUDA graph cannot do.
        if (
            trusted
            or not (self._check or self._check_result)
            or getattr(_assumed, "on", False)
            or os.environ.get("TOKENCOMP_KERNELS_CHECK", "1") == "0"
            or (device == "cuda" and torch.cuda.is_current_stream_capturing())
        ):
            return form(*args)
        if self._check is not None:
            self._check(*args)
        result = form(*args)
        if self._check_result is not None:
            self._check_result(result)
        return result

    def _runs_triton(self, x: Tensor) -> bool:
        """Whether the Triton form runs; in mode `auto` only where it has passed the self-test."""
        if which(x) == "naive":
            return False
        forced = mode(os.environ.get("TOKENCOMP_KERNELS", "")) == "triton"
        return forced or selftest.passes(self.name, x.device, x.dtype)

    def _triton(self, *args: Any) -> Any:
        module, name = self._triton_form
        form, device = getattr(importlib.import_module(module), name), args[0].device
        # Triton launches on the current GPU and does not look at the device of its arguments, which
        # matters for models whose layers are spread over several GPUs.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return form(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    """Whether a tensor among the arguments, or in a list of them, requires a gradient."""
    flat = (t for arg in args for t in (arg if isinstance(arg, list) else (arg,)))
    return any(isinstance(t, Tensor) and t.requires_grad for t in flat)


@contextmanager
def plain() -> Iterator[None]:
    """Run the ops of this thread in plain PyTorch, whatever the environment says.

    A counter of FLOPs sees the products of the plain form, and nothing of a Triton kernel.
    """
    before, _assumed.plain = getattr(_assumed, "plain", False), True
    try:
        yield
    finally:
        _assumed.plain = before


@contextmanager
def exact(tensor: Tensor, trusted: bool = True) -> Iterator[None]:
    """Run code that chooses rows: without autocast for the tensor's device, and without checks.

    Rounding by autocast could select other rows. Checks of values are skipped in this thread if
    the caller has checked its input itself (`trusted`): each reads a value on the host, for which
    the device must finish first.
    """
    device, before = tensor.device.type, getattr(_assumed, "on", False)
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    _assumed.on = before or trusted
    try:
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            yield
    finally:
        _assumed.on = before


def prepare(device: torch.device, *dtypes: torch.dtype) -> list[selftest.Verdict]:
    """Run the self-test of a card, if it has no verdicts, before an op is needed.

    Later calls, compiled graphs and captured CUDA graphs then find the verdicts. Returns those of
    all ops in all floating `dtypes`; none where plain PyTorch runs anyway, or Triton is forced.
    """
    forced = mode(os.environ.get("TOKENCOMP_KERNELS", "")) == "triton"
    if device.type == "cpu" or forced or which(torch.empty(0, device=device)) == "naive":
        return []
    tested = [dtype for dtype in dict.fromkeys(dtypes) if dtype in selftest.TESTED]
    return [v for dtype in tested for v in selftest.verdicts(device, dtype)]


def status() -> dict[str, str | None]:
    """Return what ``tokencomp doctor`` shows: mode, backend, Triton's version, problem and device.

    ``backend`` is ``"naive"``, ``"triton"`` or ``"unavailable"`` (Triton was requested and cannot
    run), and ``problem`` says why it is not Triton.
    """
    device, name = torch.device("cpu"), "cpu"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
    problem = triton_problem()
    version = None if problem else importlib.import_module("triton").__version__
    try:
        backend = which(torch.empty(0, device=device))
        problem = problem or _device_problem(device)
    except KernelError as error:
        backend, problem = "unavailable", str(error)
    return {
        "mode": mode(os.environ.get("TOKENCOMP_KERNELS", "")), "backend": backend,
        "triton": version, "problem": problem, "device": name,
    }  # fmt: skip


def _device_problem(device: torch.device) -> str | None:
    """Return why Triton cannot run on `device`, or None if it can."""
    if device.type == "cpu":
        if not interpreting():
            return "the tensor is on the CPU and TRITON_INTERPRET=1 is not set"
        library = importlib.import_module("triton.language")
        # Triton decides at import time whether its functions are compiled or interpreted.
        if type(library.min).__name__ == "JITFunction":
            return "TRITON_INTERPRET=1 was set after Triton was imported; set it earlier"
        return None
    if device.type != "cuda":
        return f"the tensor is on {device.type!r}; the Triton kernels run on 'cuda'"
    if torch.version.hip is not None:
        return "the Triton kernels are compiled and tested for NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    return None


@functools.cache
def _warn_once(problem: str) -> None:
    """Log that a GPU falls back to PyTorch; the cache limits it to once per problem."""
    _log.warning("tokencomp kernels run in plain PyTorch on this GPU: %s", problem)
