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
    family = FAMILIES[request.param]
    reason = family.defect(request.node.originalname)
    if reason:
        pytest.skip(reason)
    return family


@pytest.fixture(params=["sdpa", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
