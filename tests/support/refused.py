"""Arguments that an op must refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from tokencomp.kernels import KernelError


def refused(
    op: Callable[..., object],
    arguments: Mapping[str, Any],
    changes: Iterable[tuple[Mapping[str, Any], str]],
) -> None:
    """Each of the changes to arguments that the op takes is a `KernelError` with its message."""
    op(**arguments)
    for change, message in changes:
        with pytest.raises(KernelError, match=message):
            op(**{**arguments, **change})
