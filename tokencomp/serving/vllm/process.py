"""How the processes of `tokencomp serve --engine vllm` end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

METRICS = "tokencomp-metrics-"  # beginning of the folder's name that `tokencomp serve` makes
ENV_METRICS = "PROMETHEUS_MULTIPROC_DIR"
ENV_OWNER = "TOKENCOMP_METRICS_OWNER"  # number of the process that removes the folder of metrics
OWNER = "owner"  # file in that folder which the server locks
ENGINE_DIED = 70  # exit code after the death of the engine
PR_SET_PDEATHSIG = 1  # of prctl(2)
logger = logging.getLogger("vllm.tokencomp")


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, if that is a part of it.

    The engine and its workers would otherwise outlive a server that was killed, and keep its
    memory. Only Linux can do so.
    """
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def remove_metrics_at_exit() -> None:
    """Let the process that `tokencomp serve` became remove the folder of metrics when it ends.

    vLLM also loads plugins in plain subprocesses, for example to look at a class of a model at the
    first start. Their end must not remove the folder of the server.
    """
    if os.environ.get(ENV_OWNER) == str(os.getpid()):
        atexit.register(_remove_metrics)


def _remove_metrics() -> None:
    folder = Path(os.environ.get(ENV_METRICS, ""))
    if folder.name.startswith(METRICS):
        shutil.rmtree(folder, ignore_errors=True)


def hold_metrics(folder: Path) -> None:
    """Lock a folder of metrics while this process and its parts run; remove those of killed ones.

    The lock outlives `exec`, and the system drops it when the last part ends. A folder without the
    file of the lock is another server's that starts now, or the operator's.
    """
    import fcntl

    for owner in folder.parent.glob(f"{METRICS}*/{OWNER}"):
        with contextlib.suppress(OSError), owner.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)
    if folder.name.startswith(METRICS):
        handle = os.open(folder / OWNER, os.O_CREAT | os.O_WRONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.set_inheritable(handle, True)


def end_after_engine() -> None:
    """End this process with `ENGINE_DIED` (vLLM: 0), so that a supervisor starts it again."""
    logger.error("the engine has died: this server ends with exit code %d", ENGINE_DIED)
    if os.environ.get(ENV_OWNER) == str(os.getpid()):
        _remove_metrics()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(ENGINE_DIED)
