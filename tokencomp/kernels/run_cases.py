"""Runs the cases of ops in their Triton form and in their plain form, as a subprocess.

    python -m tokencomp.kernels.run_cases DEVICE DTYPE OP [OP ...]

Prints a line of JSON when the device answers, and one per op (`selftest.Verdict`).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from tokencomp.kernels import dispatch
from tokencomp.kernels.cases import CASES, Case, leaves, op_of
from tokencomp.kernels.selftest import Verdict

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WIDE = ("dpp_select", "facility_select", "topk_stable")
"""Ops that get fp32 whatever the dtype of a model."""


def main(device: str, dtype: str, *ops: str) -> None:
    place = torch.device(device)
    torch.zeros(1, device=place).cpu()
    print(json.dumps({"ready": True}), flush=True)
    for op in ops:
        print(json.dumps(asdict(test_op(op, place, getattr(torch, dtype)))), flush=True)


def test_op(op: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Compare both forms in all cases of an op."""
    dtype = torch.float32 if op in WIDE else dtype
    largest: float | None = None
    for name in (name for name in CASES if op_of(name) == op):
        try:
            difference = compare(CASES[name], op, device, dtype)
        except torch.OutOfMemoryError as error:
            return Verdict(op, False, _first_line(name, error), final=False)
        except Exception as error:  # of any kind: a compiler, a driver, a comparison
            return Verdict(op, False, _first_line(name, error))
        if difference is not None:
            largest = max(difference, largest or 0.0)
    return Verdict(op, True, difference=largest)


def _first_line(name: str, error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"case {name!r}: {type(error).__name__}: {' '.join(lines[:5])[:300]}"


def compare(case: Case, op: str, device: torch.device, dtype: torch.dtype) -> float | None:
    """Raise if the forms differ; returns the largest difference of floating-point results."""
    x = inputs(case.shape, dtype).to(device)
    with dispatch.plain():
        want = leaves(case.call(x))
    with limits(case, op):
        got = leaves(case.call(x))
    assert len(got) == len(want), f"{len(got)} results for {len(want)}"
    largest: float | None = None
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype, f"a result has {a.dtype}, not {b.dtype}"
        bound = TOLERANCE.get(b.dtype, TOLERANCE[torch.float32])
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        if b.is_floating_point() and b.numel():
            largest = max(largest or 0.0, _difference(a, b))
    return largest


def _difference(a: Tensor, b: Tensor) -> float:
    return float(torch.where(a == b, 0.0, (a - b).abs().double()).nan_to_num().max())


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values, the same in every run, that fp16 and bf16 hold exactly.

    So the plain form and the Triton form choose among the same rows in every dtype.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(dtype) if dtype == torch.float32 else ((16 * x).round() / 16).to(dtype)


@contextmanager
def limits(case: Case, op: str) -> Iterator[None]:
    """Lower the limits of the op's Triton module inside the block."""
    module = importlib.import_module(f"tokencomp.kernels.{op}.triton")
    before = {name: getattr(module, name) for name, _ in case.limits}
    try:
        for name, value in case.limits:
            setattr(module, name, value)
        yield
    finally:
        for name, own in before.items():
            setattr(module, name, own)


if __name__ == "__main__":
    main(*sys.argv[1:])
