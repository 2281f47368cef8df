"""What results depend on: versions, commit, hardware, and the model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "transformers", "accelerate", "numpy"),
    *("pillow", "av", "triton", "lmms_eval"),
)


def versions() -> dict[str, str]:
    """Versions of Python, tokencomp and the packages that results depend on."""
    from tokencomp import __version__

    installed = {"python": platform.python_version(), "tokencomp": __version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    if "torch" in installed:  # its metadata lack the build, such as +cu132
        from torch import __version__ as build

        installed["torch"] = str(build)
    return installed


def commit() -> str | None:
    """Commit of the checkout tokencomp runs from ("+dirty" with changes), None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = git(root, "rev-parse", "HEAD")
        return head + ("+dirty" if git(root, "status", "--porcelain", "-uno") else "")
    return None


def git(root: Path, *args: str) -> str:
    """Output of a git command in the checkout at `root`, without the trailing newline."""
    # Without the locks that `status` takes to refresh the index: on a full disk, lock files remain.
    command = ["git", "--no-optional-locks", "-C", str(root), *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30
    ).stdout.rstrip()


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and GPUs; no host name."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, IndexError):
        return re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0].strip()
    return platform.processor() or platform.machine()


def process_rank() -> tuple[int, int]:
    """Rank and world size under `accelerate launch` or torchrun, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def environment() -> dict[str, Any]:
    """Everything above, with the date (UTC) and the command."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
    }


def model_identity(model: Any, processor: Any, name: str = "") -> dict[str, Any]:
    """What answers depend on besides the setting: the model, its weights and its inputs."""
    from tokencomp.adapters.registry import unwrap
    from tokencomp.trained.cards import weights_hash

    base = unwrap(model)
    path = str(getattr(base, "name_or_path", "") or type(base).__name__)
    return {
        "model": name or public_name(path),
        "model_type": base.config.model_type,
        "parameters": sum(p.numel() for p in base.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_hash(model),
        "pixels": _pixels(processor),
    }


def public_name(name: str) -> str:
    """The name of a model in tables and pages: of a local folder, only its last part."""
    return Path(name).name if Path(name).exists() else name


def _pixels(processor: Any) -> dict[str, Any]:
    """Target sizes and token counts of the image and video processors."""
    sizes = {}
    for part in ("image_processor", "video_processor"):
        own = getattr(processor, part, None)
        size = dict(getattr(own, "size", None) or {})
        size |= {name: getattr(own, name, None) for name in ("max_soft_tokens", "max_image_tokens")}
        if known := {k: v for k, v in size.items() if v is not None}:
            sizes[part] = known
    return sizes
