"""Breaks Triton forms in a process that has this folder on its path: FAULT="KIND OP [OP ...]"."""

import importlib
import os

if fault := os.environ.get("FAULT"):
    from support.kernel_faults import broken

    kind, *ops = fault.split()
    for op in ops:
        module = importlib.import_module(f"tokencomp.kernels.{op}.triton")
        setattr(module, op, broken(kind, getattr(module, op)))
