"""Counts aten calls and host reads, as a GPU would launch and wait for them."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tokencomp.kernels import checks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# aten calls that block the host until their result is there
READS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class Calls(TorchDispatchMode):
    """Counts aten calls while it is active.

    Attributes
    ----------
    calls, reads
        Number of calls, and of those among them that make the host wait.
    sites
        Line of the library (or of the model) and call → how often; host reads stand there as
        `read` once more.
    """

    def __init__(self, sites: bool = False) -> None:
        super().__init__()
        self.calls = self.reads = 0
        self._in_kernel = False
        self.sites: Counter[str] | None = Counter() if sites else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        self._note(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ in READS:
            self._read()
        # What the plain version of a kernel copies to the host is no part of the Triton version.
        self._in_kernel = func.namespace == "tokencomp"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._in_kernel = False

    def _note(self, name: str) -> None:
        if self.sites is not None:
            self.sites[f"{_site()} {name}"] += 1

    def _read(self) -> None:
        self.reads += 1
        self._note("read")

    def count_check(self, condition: Tensor, message: str) -> None:
        """Stands in for `checks.holds`, which reads its condition inside of a kernel."""
        self._read()
        assert bool(condition), message

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        """Count copies to the host (`cpu`, `tolist`), which on a CPU call nothing, as reads."""
        cpu, tolist = Tensor.cpu, Tensor.tolist

        def count_cpu(tensor: Tensor, *args: Any) -> Tensor:
            if not self._in_kernel:
                self._read()
            copy = cpu(tensor, *args)
            copy.is_host_copy = True  # type: ignore[attr-defined]  # a mark of our own
            return copy

        def count_list(tensor: Tensor) -> Any:
            if not (self._in_kernel or hasattr(tensor, "is_host_copy")):
                self._read()
            return tolist(tensor)

        with (
            mock.patch.object(Tensor, "cpu", count_cpu),
            mock.patch.object(Tensor, "tolist", count_list),
            mock.patch.object(checks, "holds", self.count_check),
        ):
            yield


def _site() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "tokencomp" in frame.filename and "benchmarks" not in frame.filename:
            return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"
    return "model"
