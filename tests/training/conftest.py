from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from support.trained import tiny

    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    from support.trained import write_data

    return str(write_data(tmp_path_factory.mktemp("data"), 40))


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`selector.safetensors` of a short training of `tiny` on `data`, in its output folder."""
    from support.trained import SELECTOR

    from tokencomp.training.selector.train import train_selector

    return train_selector(*tiny, data, tmp_path_factory.mktemp("selector"), SELECTOR)
