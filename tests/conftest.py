"""Tiny random models and prompts. Nothing is downloaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels are tested in Triton's interpreter. Triton reads this when it is
    # first imported, which importing transformers may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Workers and the processes that tests start share the cores; tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
gc.disable()  # imports leave no garbage to look for; `pytest_runtestloop` enables it

from support.families import CORE, FAMILIES, Family  # noqa: E402
from support.family.hybrid import HYBRID  # noqa: E402
from support.family.structural import STRUCTURAL  # noqa: E402
from support.thinning import thin_out  # noqa: E402

# They share decoder and adapter with smolvlm, llava_onevision, qwen2_vl, qwen3_vl and qwen3_5.
TWINS = {"idefics3", "llava", "llava_next", "llava_next_video", "qwen2_5_vl", "qwen3_vl_moe"}
TWINS |= {"minicpmv4_6"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what plain pytest leaves out of tests that are marked `thin`."""
    thin_out(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    """Garbage is looked for in what the tests make, not in the modules that they import."""
    gc.freeze()
    gc.enable()
    try:
        return (yield)
    finally:
        gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # the family comes first in the names of tests
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module may name the families that it runs on, as `FAMILY_NAMES`; the default is `CORE`.

    Of families that share decoder and adapter (`TWINS`), plain pytest runs one, -m long the other.
    A module may name further ones for -m long, as `LONG_FAMILIES`.
    """
    if "family" in metafunc.fixturenames:
        late = TWINS.union(getattr(metafunc.module, "LONG_FAMILIES", ()))
        marks = {name: [pytest.mark.long] for name in late}
        names = getattr(metafunc.module, "FAMILY_NAMES", CORE)
        every = [pytest.param(name, marks=marks.get(name, [])) for name in names]
        metafunc.parametrize("family", every, indirect=True)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Family:
    """Every supported model family in turn."""
    return {**FAMILIES, **HYBRID, **STRUCTURAL}[request.param]


@pytest.fixture(params=["sdpa", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
