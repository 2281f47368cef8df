"""Tiny random models and prompts. Nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from tests_support import FAMILIES, Family


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Every supported model family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(params=["sdpa", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
