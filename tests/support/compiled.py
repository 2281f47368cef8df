"""What tests of compiled decoding share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.configuration_utils import CompileConfig


def compiled(model: Any, backend: str = "eager") -> Any:
    """Options that make `generate` compile on a CPU too; skips where it cannot, unpatched."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    if not hasattr(config, "_compile_all_devices"):
        pytest.skip("this release compiles on accelerators alone")
    config._compile_all_devices = True
    return config


def graphs() -> int:
    """Graphs since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def breaks() -> dict[str, int]:
    """Why graphs have ended early, and how often."""
    return dict(torch._dynamo.utils.counters["graph_break"])


def reset() -> None:
    """Forget what was compiled and counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
