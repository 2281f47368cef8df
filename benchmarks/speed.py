"""Every table of speed and memory, made again where it is older than the code that it measures.

    python -m benchmarks.speed --list       # each table: commit, and whether the code has changed
    python -m benchmarks.speed              # makes the outdated ones, on an otherwise idle machine
    python -m benchmarks.speed prefill calls    # these, outdated or not

Every benchmark compares with the unpatched model in the same process, in alternating runs, and
writes its page when it ends. Stop at any time: the next call goes on with what is still outdated.
`prefill` and `tower` take half an hour each, `calls` and `weights` minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.figures import ENGINE, ROOT, changed
from benchmarks.publishing import version

VLLM = ("tokencomp/serving",)


@dataclass(frozen=True)
class Table:
    """One benchmark.

    Attributes
    ----------
    file
        Its results, below `benchmarks/`.
    commands
        Module and arguments of every run that it takes.
    code
        Further paths of the code that it measures.
    needs
        A package without which it cannot run.
    """

    file: str
    commands: tuple[tuple[str, ...], ...]
    code: tuple[str, ...] = ()
    needs: str = "torch"

    @property
    def outdated(self) -> str:
        """Why today's code may give other numbers; "" where it does not."""
        path = ROOT / "benchmarks" / self.file
        if not path.exists():
            return "not measured yet"
        runs = [{"commit": commit} for commit in self.commits]
        reasons = [changed(run, (*ENGINE, *self.code), ROOT) for run in runs]
        return next(filter(None, reasons), "")

    @property
    def commits(self) -> list[str]:
        """Commits of the stored runs."""
        text = (ROOT / "benchmarks" / self.file).read_text(encoding="utf-8")
        return sorted(set(re.findall(r'"commit": ?"([^"]+)"', text)))


TABLES: dict[str, Table] = {
    "calls": Table("kernels/calls.json", (("benchmarks.kernels.calls",),)),
    "weights": Table("kernels/weights.json", (("benchmarks.kernels.weights",),)),
    "chunked": Table("models/chunked_prefill.json", (("benchmarks.models.chunked_prefill",),)),
    "tower": Table(
        "models/tower.jsonl",
        (
            ("benchmarks.models.tower", "--headline"),
            ("benchmarks.models.tower", "--towers", "--again"),
            ("benchmarks.models.tower", "--cases", "qwen-image", "--rounds", "1", "--part", "4"),
            ("benchmarks.models.tower", "--cases", "qwen-video", "--rounds", "1", "--part", "4"),
        ),
    ),
    "prefill": Table("models/prefill.jsonl", (("benchmarks.models.prefill",),)),
    "serving": Table("serving/results.jsonl", (("benchmarks.serving.run",),), VLLM, "vllm"),
    "clients": Table("serving/clients.jsonl", (("benchmarks.serving.clients",),), VLLM, "vllm"),
    "burst": Table("serving/burst.jsonl", (("benchmarks.serving.burst",),), VLLM, "vllm"),
    "ratio-zero": Table(
        "serving/ratio_zero.jsonl", (("benchmarks.serving.ratio_zero",),), VLLM, "vllm"
    ),
}


def state(table: Table) -> str:
    """What `--list` says of a table."""
    reason = table.outdated
    if reason == "not measured yet":
        return reason
    made = ", ".join(version(commit) for commit in table.commits)
    return f"{made}: {reason or 'current'}"


def make(name: str) -> bool:
    """Run the benchmarks of one table; whether all of them ended well."""
    table = TABLES[name]
    if importlib.util.find_spec(table.needs) is None:
        print(f"{name}: left out, it needs {table.needs}", flush=True)
        return True
    for command in table.commands:
        print(f"{name}: {' '.join(command)}", flush=True)
        started = time.monotonic()
        code = subprocess.run((sys.executable, "-m", *command), cwd=ROOT).returncode
        print(f"{name}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help=", ".join(TABLES))
    parser.add_argument("--list", action="store_true", help="only say how old every table is")
    args = parser.parse_args()
    if args.list:
        for name, table in TABLES.items():
            print(f"{name}: {state(table)}")
        return 0
    chosen = args.tables or [name for name, table in TABLES.items() if table.outdated]
    return int(not all([make(name) for name in chosen]))


if __name__ == "__main__":
    raise SystemExit(main())
