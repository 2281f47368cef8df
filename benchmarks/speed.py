"""What a release measures again: every table of speed and memory, on an otherwise idle machine.

    python -m benchmarks.speed --list           # each table, and when its results were measured
    python -m benchmarks.speed                  # all of them
    python -m benchmarks.speed prefill calls    # these

Every benchmark compares with the unpatched model in the same process, in alternating runs, and
writes its page when it ends. `prefill` and `tower` take half an hour each, `calls` and `weights`
minutes. The tables of vLLM are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time

from benchmarks.publishing import FOLDER, version

TABLES: dict[str, tuple[str, ...]] = {
    "calls": ("kernels.calls",),
    "weights": ("kernels.weights",),
    "tower": (
        "models.tower --headline",
        "models.tower --towers --again",
        "models.tower --cases qwen-image --rounds 1 --part 4",
        "models.tower --cases qwen-video --rounds 1 --part 4",
    ),
    "prefill": ("models.prefill",),
    "decoding": ("models.decoding",),
    "serving": ("serving.run",),
    "clients": ("serving.clients",),
    "burst": ("serving.burst",),
    "ratio-zero": ("serving.ratio_zero",),
}
"""Module and options of every run of a table."""
FILES = {"serving": "serving/results"}


def made(name: str) -> str:
    """Commits and days of the stored results of a table."""
    module = TABLES[name][0].partition(" ")[0]
    stem = FOLDER / FILES.get(name, module.replace(".", "/"))
    files = [f for f in (stem.with_suffix(".json"), stem.with_suffix(".jsonl")) if f.exists()]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    commits = sorted({version(c) for c in re.findall(r'"commit": ?"([^"]+)"', text)})
    days = sorted(set(re.findall(r'"date": ?"(\d{4}-\d\d-\d\d)', text)))
    return f"{', '.join(days)}; {', '.join(commits)}" if files else "not measured yet"


def make(name: str) -> bool:
    """Run the benchmarks of one table; whether all of them ended well."""
    if TABLES[name][0].startswith("serving") and importlib.util.find_spec("vllm") is None:
        print(f"{name}: left out, it needs vllm", flush=True)
        return True
    for command in TABLES[name]:
        print(f"{name}: {command}", flush=True)
        started = time.monotonic()
        arguments = [sys.executable, "-m", *f"benchmarks.{command}".split()]
        code = subprocess.run(arguments, cwd=FOLDER.parent).returncode
        print(f"{name}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help=", ".join(TABLES))
    parser.add_argument("--list", action="store_true", help="only say when each was measured")
    args = parser.parse_args()
    if args.list:
        for name in TABLES:
            print(f"{name}: {made(name)}")
        return 0
    return int(not all([make(name) for name in args.tables or TABLES]))


if __name__ == "__main__":
    raise SystemExit(main())
