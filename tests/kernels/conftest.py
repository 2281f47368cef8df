"""Devices and implementations that the kernel tests run on.

Without a GPU the Triton kernels run in Triton's interpreter: a small case of each op with plain
pytest (`test_every_op.py`), and all that takes a `place` with ``-m long``. With a GPU, and
TRITON_INTERPRET not set, they run there, and ``pytest -m gpu tests/kernels`` runs the same suite.
"""

import importlib
import os

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
if not ON_GPU:
    # Triton reads the variable when a kernel is defined, so it is set before the first import.
    os.environ["TRITON_INTERPRET"] = "1"

PLACES = [pytest.param(("naive", "cpu"), id="naive-cpu")]
if ON_GPU:
    PLACES += [
        pytest.param(("naive", "cuda"), id="naive-cuda", marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ]
else:
    # The interpreter takes minutes for all shapes.
    PLACES += [pytest.param(("triton", "cpu"), id="triton-cpu", marks=pytest.mark.long)]


@pytest.fixture
def device() -> torch.device:
    """The device that Triton kernels run on: the GPU, or the CPU for the interpreter."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device, with ``TOKENCOMP_KERNELS`` set to the implementation under test."""
    backend, device = request.param
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", backend)
    return torch.device(device)


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat spans above 64 rows as long ones, with rounds of 8 candidates."""
    from tokencomp.kernels.maxmin_select import rounds

    from tokencomp.kernels import maxmin_select

    monkeypatch.setitem(maxmin_select.__globals__, "MAX_GRAM_ROWS", 64)
    monkeypatch.setattr(rounds, "ROUND", 8)
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.maxmin_select.triton")
        monkeypatch.setattr(triton, "MAX_GRAM_ROWS", 64)
        monkeypatch.setattr(triton, "CANDIDATES", 8)
