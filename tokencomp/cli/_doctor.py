"""Checks of `tokencomp doctor`."""

from __future__ import annotations

import importlib.util
from typing import Any

from tokencomp.cli._selfcheck import Finding, self_check
from tokencomp.errors import TokenCompError, install

FLOOR, CEILING = "5.6", "6"


def facts() -> dict[str, str]:
    """Versions, system, and attention backends, the default first, as text."""
    from tokencomp.evaluation.environment import hardware, versions

    where = hardware()
    flash = ["flash_attention_2"] if importlib.util.find_spec("flash_attn") is not None else []
    return {
        **versions(),
        "system": f"{where['system']}, {where['cpu']}, {where['cores']} cores",
        "attention": ", ".join(["sdpa", "eager", *flash]),
    }


def environment_checks() -> list[Finding]:
    """What works, and what does not, with the installed packages."""
    return [
        _transformers(),
        _kernels(),
        *_ops(),
        _gpu(),
        _video(),
        _optional("eval", "lmms_eval", "tokencomp eval --tasks (not --data FILE)"),
        _optional("serve", "uvicorn", "tokencomp serve"),
        _mlx(),
        _optional("train", "peft", "tokencomp train adsc"),
    ]


def _transformers() -> Finding:
    import transformers
    from packaging.version import Version

    from tokencomp.adapters.verified import standing

    version = Version(transformers.__version__)
    good = Version(FLOOR) <= version < Version(CEILING)
    detail = f"{standing().removeprefix('transformers ')}; supported: >= {FLOOR}, < {CEILING}"
    return Finding("transformers", good, detail + ("" if good else ". pip install -U transformers"))


def _kernels() -> Finding:
    from tokencomp.kernels import KernelError, status

    try:
        state = status()
    except KernelError as error:
        return Finding("kernels", False, str(error))
    if state["backend"] == "unavailable":
        return Finding("kernels", False, str(state["problem"]))
    mode = f"mode {state['mode']}"
    if state["backend"] == "triton":
        return Finding("kernels", True, f"Triton {state['triton']} on {state['device']} ({mode})")
    why = "no CUDA device" if state["device"] == "cpu" else state["problem"] or "as requested"
    return Finding("kernels", True, f"plain PyTorch ({why}; {mode})")


def _ops() -> list[Finding]:
    """The self-test of the card, anew, for the dtypes of models: a row per op and dtype."""
    import torch

    from tokencomp.kernels import KernelError, status
    from tokencomp.kernels.selftest import TESTED, verdicts

    try:
        state = status()
    except KernelError:
        return []
    if state["backend"] != "triton":
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for dtype in TESTED:
        for verdict in verdicts(device, dtype, fresh=True):
            largest = verdict.difference
            equal = "equal" if not largest else f"largest difference {largest:.1e}"
            form = f"Triton, {equal}" if verdict.passed else f"plain PyTorch: {verdict.why}"
            name = f"{verdict.op}, {str(dtype).removeprefix('torch.')}"
            rows.append(Finding(name, True if verdict.passed else None, form))
    return rows


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "GPU", None, "none: times are of this CPU, ratios hold, absolute times do not"
        )
    name = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding("GPU", True, f"{name}, {total:.0f} GiB, bf16 {torch.cuda.is_bf16_supported()}")


def _video() -> Finding:
    """Video decoders; only PyAV is used without being asked for."""
    if importlib.util.find_spec("av") is None:
        return Finding("video files", False, f"PyAV is not installed: {install('media')}")
    also = "; by name also with torchcodec" if importlib.util.find_spec("torchcodec") else ""
    return Finding("video files", True, f"read with PyAV{also}")


def _optional(extra: str, module: str, what: str) -> Finding:
    if importlib.util.find_spec(module) is not None:
        return Finding(f"extra [{extra}]", True, f"{what} can run")
    return Finding(f"extra [{extra}]", None, f"{what} needs {install(extra)}")


def _mlx() -> Finding:
    name = "extra [mlx]"
    if importlib.util.find_spec("mlx_vlm") is None:
        return Finding(name, None, f"tokencomp serve --engine mlx needs {install('mlx')}")
    try:
        from tokencomp.mlx import version
    except TokenCompError as error:
        return Finding(name, False, str(error))
    return Finding(name, True, f"tokencomp serve --engine mlx can run, on mlx-vlm {version()}")


def model_checks(name: str, device: str) -> list[Finding]:
    """Load a model, and compare compressed calls with the reference."""
    from tokencomp.inputs.loading import load_model

    try:
        model, processor = load_model(name, device=device)
        return [_loaded(model, name), *self_check(model, processor)]
    except TokenCompError as error:
        return [Finding(f"self-check on {name}", False, str(error))]


def _loaded(model: Any, name: str) -> Finding:
    from tokencomp.adapters.registry import adapter_for
    from tokencomp.torchlib.compat import attention_implementation

    adapter = adapter_for(model)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    backend = attention_implementation(adapter.text_config)
    detail = f"{adapter.family}, {size:.1f} M parameters, {model.dtype}, {backend}, {model.device}"
    return Finding(f"model {name}", True, detail.replace("torch.", ""))
