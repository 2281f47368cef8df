"""What a number depends on besides the code: versions, commit, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "numpy",
    "pillow",
    "av",
    "decord",
    "triton",
    "lmms_eval",
)


def versions() -> dict[str, str]:
    """Versions of Python, tokencomp and the packages that results depend on."""
    from tokencomp import __version__

    found = {"python": platform.python_version(), "tokencomp": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout tokencomp runs from ("+dirty" with changes), None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+dirty" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


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
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Everything above, with the date (UTC) and the command."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
    }


def provenance(facts: dict[str, Any]) -> str:
    """What `environment` returned as one line for a page."""
    where, found = facts["hardware"], facts["versions"]
    device = ", ".join(where.get("gpus", ())) or f"{where['cpu']}, {where['threads']} threads"
    names = [n for n in ("torch", "transformers", "triton", "tokencomp") if n in found]
    made = str(facts["commit"]).partition("+")
    commit = made[0][:12] + made[1] + made[2]
    listed = ", ".join(f"{n} {found[n]}" for n in names)
    return f"`{facts['command']}`; {device}; {listed}; commit {commit}; {facts['date'][:10]}"
