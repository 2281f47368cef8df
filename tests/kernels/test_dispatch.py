"""The choice of the implementation, its messages to the user, and the cost of importing."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokencomp.kernels.bipartite_match import _op as op

from tokencomp.kernels import KernelError, bipartite_match, status
from tokencomp.kernels import dispatch as module
from tokencomp.kernels.dispatch import which

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    module.triton_problem.cache_clear()
    module._warn_once.cache_clear()


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "TOKENCOMP"))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**env, **environment},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing() -> None:
    """Neither Triton nor transformers is loaded, and names of ops are functions, not folders."""
    code = (
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
        "import tokencomp.kernels as ours\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'triton', 'transformers', 'kernels'}, new\n"
        "import tokencomp.kernels.topk_stable as _\n"
        "assert all(callable(getattr(ours, name)) for name in ours.__all__)\n"
        "print(ours.topk_stable(torch.tensor([1., 3.]), 1).item())"
    )
    assert python(code).strip() == "1"


def test_cpu_tensors_run_pytorch_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENCOMP_KERNELS", raising=False)
    assert which(torch.zeros(1)) == "naive"


def test_triton_mode_reaches_triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    assert which(torch.zeros(1, device=device)) == "triton"
    monkeypatch.setattr(op, "naive", None)  # a silent fallback would fail
    bipartite_match(torch.randn(4, 8, device=device))


def test_triton_mode_without_interpreter_is_refused_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="on the CPU and TRITON_INTERPRET=1 is not set"):
        which(torch.zeros(1))


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    with pytest.raises(KernelError, match="pip install triton"):
        which(torch.zeros(1))
    monkeypatch.setenv("TOKENCOMP_KERNELS", "auto")
    assert which(torch.zeros(1)) == "naive"
    assert status()["triton"] is None and "pip install" in status()["problem"]


@pytest.mark.parametrize(
    ("capability", "hip", "backend", "message"),
    [
        ((9, 0), None, "triton", None),
        ((8, 0), None, "triton", None),
        ((7, 5), None, "naive", "below"),
        ((9, 0), "6.2", "naive", "NVIDIA"),
    ],
)
def test_gpu_choice(
    capability: tuple[int, int], hip: str | None, backend: str, message: str | None,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """With a simulated GPU tensor, old devices and AMD fall back and log one warning."""
    pytest.importorskip("triton")

    class Cuda:
        device = torch.device("cuda", 0)

    monkeypatch.setenv("TOKENCOMP_KERNELS", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with caplog.at_level(logging.WARNING):
        assert which(Cuda()) == backend  # type: ignore[arg-type]
        which(Cuda())  # type: ignore[arg-type]
    messages = [record.message for record in caplog.records]
    assert len(messages) == (0 if message is None else 1)
    assert message is None or message in messages[0]


def test_checks_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((4, 2), torch.nan)
    monkeypatch.setenv("TOKENCOMP_KERNELS", "naive")
    with pytest.raises(KernelError, match="NaN"):
        bipartite_match(x)
    monkeypatch.setenv("TOKENCOMP_KERNELS_CHECK", "0")
    bipartite_match(x)
