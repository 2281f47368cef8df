"""Where the kernels run in these tests.

Without a GPU the Triton kernels run in Triton's interpreter; with one (and TRITON_INTERPRET unset)
they run on it, and ``pytest -m gpu tests/kernels`` is the same suite there.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
if not ON_GPU:
    # Read when a kernel is defined, so it must be set before the first one is imported.
    os.environ["TRITON_INTERPRET"] = "1"

PLACES = [pytest.param(("naive", "cpu"), id="naive-cpu")]
if ON_GPU:
    PLACES += [
        pytest.param(("naive", "cuda"), id="naive-cuda", marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ]
else:
    PLACES += [pytest.param(("triton", "cpu"), id="triton-cpu")]


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run here: the GPU, or the CPU for the interpreter."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device, with the implementation to test chosen."""
    backend, device = request.param
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", backend)
    return torch.device(device)
