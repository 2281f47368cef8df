"""The self-test of a card: no Triton form runs before it has equalled plain PyTorch there.

    call of an op ── verdict in this process? ── yes ──────────────────────────┐
                            │ no                                               │
                     verdict on disk? ── yes ──────────────────────────────────┤
                            │ no                                               │
                     a subprocess runs the cases of the ops ── verdicts on disk┴─ Triton form, or
                                                                                  plain form and
                                                                                  one warning

The cases (`tokencomp.kernels.cases`) run in a subprocess, because an illegal memory access ends
every later CUDA call of its process. A verdict depends on the card, its compute capability, the
dtype, the releases of Triton and torch, and the source of this package. If the subprocess cannot
start, or the card has no memory left for it, the plain form runs, and nothing is noted on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

START_SECONDS = 300.0
"""How long the subprocess may take until the card answers: imports, and its first contact."""
OP_SECONDS = 120.0
"""How long one op may take: Triton compiles several kernels for it."""
TESTED = (torch.float32, torch.float16, torch.bfloat16)

OPS: list[str] = []
"""Names of all ops, which each `dispatch.Op` adds."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_known: dict[tuple[str, torch.device, torch.dtype], Verdict] = {}


@dataclass(frozen=True)
class Verdict:
    """The result of an op's cases on one card, in one dtype.

    Attributes
    ----------
    op
        Name of the op.
    passed
        Whether the Triton form equals the plain form in every case.
    why
        What was wrong, or "".
    difference
        Largest absolute difference of floating-point results, or None without one.
    final
        Whether it is noted on disk; False if the op could not be tested.
    """

    op: str
    passed: bool
    why: str = ""
    difference: float | None = None
    final: bool = True


def passes(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton form of an op may run there; the first call tests all ops."""
    dtype = dtype if dtype in TESTED else torch.float32
    verdict = _known.get((op, device, dtype))
    if verdict is None:
        verdict = next(v for v in verdicts(device, dtype) if v.op == op)
    return verdict.passed


def verdicts(device: torch.device, dtype: torch.dtype, fresh: bool = False) -> list[Verdict]:
    """The verdicts of all ops, from this process, from disk, or from new tests.

    `fresh` tests all ops again. Ops that fail are logged once per process and reason.
    """
    with _lock:
        known = [_known.get((op, device, dtype)) for op in OPS]
        if not fresh and all(known):
            return [v for v in known if v is not None]
        path, note = _note(device, dtype)
        table = {} if fresh else _read(path, note)
        missing = [op for op in OPS if op not in table]
        if missing:
            table |= {v.op: v for v in _test(missing, device, dtype)}
            _write(path, {**note, "ops": [asdict(v) for v in table.values() if v.final]})
        failed: dict[str, list[str]] = {}  # ops by the reason
        for op in OPS:
            before = _known.get((op, device, dtype))
            _known[op, device, dtype] = table[op]
            if not table[op].passed and (before is None or before.passed):
                failed.setdefault(table[op].why, []).append(op)
        for why, ops in failed.items():
            _warn(ops, why, note, dtype)
        return [table[op] for op in OPS]


def _warn(ops: list[str], why: str, note: dict[str, Any], dtype: torch.dtype) -> None:
    _log.warning(
        "tokencomp: the Triton form of %s is not used on %s (%s, Triton %s): %s. Plain PyTorch "
        "runs instead. `tokencomp doctor` tests again; please report its output.",
        ", ".join(ops), note["card"], str(dtype).removeprefix("torch."), note["triton"], why,
    )  # fmt: skip


# -- verdicts on disk ----------------------------------------------------------------------------


def folder() -> Path:
    """The folder of verdicts: `$XDG_CACHE_HOME/tokencomp/kernels`, by default in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "tokencomp" / "kernels"


def _note(device: torch.device, dtype: torch.dtype) -> tuple[Path, dict[str, Any]]:
    """The file of the verdicts of a card and dtype, and all that they depend on."""
    card, capability = "Triton's interpreter", ""
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    note = {
        "card": card, "capability": capability, "dtype": str(dtype), "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__, "source": source_hash(),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(note).encode()).hexdigest()[:32]
    return folder() / f"{digest}.json", note


@functools.cache
def source_hash() -> str:
    """Hash of the ops' source, and of the rest of this package."""
    roots = sys.modules[__package__].__path__
    files = sorted(f for root in roots for f in Path(root).rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _read(path: Path, note: dict[str, Any]) -> dict[str, Verdict]:
    """Verdicts in a file by op; {}: there is none, it is of another source, or broken."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not note.items() <= stored.items():
            return {}
        return {row["op"]: Verdict(**row) for row in stored["ops"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, stored: dict[str, Any]) -> None:
    """Write a file at once: of two processes that test the same card, the later one stays."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        Path(part).write_text(json.dumps(stored, indent=2), encoding="utf-8")
        Path(part).replace(path)
    except OSError as error:
        if part is not None:
            with suppress(OSError):
                Path(part).unlink()
        _log.warning(
            "%s: %s. The next process tests the kernels again; XDG_CACHE_HOME names another "
            "folder.", path, error.strerror or error,
        )  # fmt: skip


# -- the subprocess ------------------------------------------------------------------------------


def _test(ops: Iterable[str], device: torch.device, dtype: torch.dtype) -> Iterator[Verdict]:
    """Test ops, in another subprocess after each one that an op ends or hangs."""
    ops = list(ops)
    while ops:
        run = _Run(ops, device, dtype)
        for verdict in run.results():
            ops.remove(verdict.op)
            yield verdict
        if not run.ready:
            yield from (Verdict(op, False, f"no test ran ({run.end})", final=False) for op in ops)
            return
        if ops:
            yield Verdict(ops.pop(0), False, run.end)


class _Run:
    """One subprocess, which prints a line when the card answers, and one per op.

    `ready` says whether the card has answered, and `end` why there are no more lines.
    """

    def __init__(self, ops: list[str], device: torch.device, dtype: torch.dtype) -> None:
        self.ready, self.end, self._left = False, "", len(ops)
        words = [str(device), str(dtype).removeprefix("torch."), *ops]
        self._command = [sys.executable, "-m", "tokencomp.kernels.run_cases", *words]

    def results(self) -> Iterator[Verdict]:
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                    text=True, env={**os.environ, "TOKENCOMP_KERNELS": "triton"},
                )  # fmt: skip
            except OSError as error:
                self.end = str(error)
                return
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_put_lines, args=(process.stdout, lines), daemon=True).start()
            try:
                yield from self._read(lines)
            finally:
                hung = bool(self.end)
                process.kill() if hung else process.wait()
                process.wait()
            if not hung:
                errors.seek(0)
                self.end = _how_it_ended(process.returncode, errors.read())

    def _read(self, lines: queue.Queue[str | None]) -> Iterator[Verdict]:
        while self._left:
            seconds = OP_SECONDS if self.ready else START_SECONDS
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                self.end = f"no result after {seconds:.0f} s"
                return
            if line is None:
                return
            with suppress(ValueError, TypeError):  # what a library prints is no verdict
                row = json.loads(line)
                if row == {"ready": True}:
                    self.ready = True
                    continue
                verdict = Verdict(**row)
                self._left -= 1
                yield verdict


def _put_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _how_it_ended(code: int, errors: bytes) -> str:
    """Exit code or signal of a subprocess, and its last line."""
    ended = f"its process ended with signal {-code}" if code < 0 else f"exit code {code}"
    last = errors.decode(errors="replace").strip().rpartition("\n")[2][:200]
    return f"{ended}: {last}" if last else ended
