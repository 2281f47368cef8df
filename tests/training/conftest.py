from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from trained_support import tiny

    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    from trained_support import write_data

    return str(write_data(tmp_path_factory.mktemp("data"), 40))


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`selector.safetensors` of a short training of `tiny` on `data`, in its output folder."""
    from trained_support import SELECTOR

    from tokencomp.training.selector.train import train_selector

    return train_selector(*tiny, data, tmp_path_factory.mktemp("selector"), SELECTOR)
