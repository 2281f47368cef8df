"""How many small bugs the tests see.

    python -m benchmarks.mutants                    # → results.json, README.md
    python -m benchmarks.mutants --area plan --missing
    python -m benchmarks.mutants --report           # only the page

A mutant is a changed expression (mutants.json) with the tests that should fail. A run by hand, not
by CI: half an hour to some hours on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from typing import Any

from benchmarks.mutants.page import PAGE, RESULTS, page
from benchmarks.mutants.run import KILLED, ROOT, Mutant, read, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--area", action="append", help="only mutants of this part of the code")
    parser.add_argument("--missing", action="store_true", help="only mutants that are not killed")
    parser.add_argument("--limit", type=int, help="at most so many mutants")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per mutant")
    parser.add_argument("--report", action="store_true", help="only rebuild the page")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    mutants = [] if args.report else read()
    mutants = [m for m in mutants if not args.area or m.area in args.area]
    if args.missing:
        mutants = [m for m in mutants if found.get(m.name, {}).get("state") != KILLED]
    mutants = mutants[: args.limit]
    about = {"commit": commit(), "python": platform.python_version()}

    def note(mutant: Mutant, result: dict[str, Any]) -> None:
        found[mutant.name] = {**result, **about}
        RESULTS.write_text(json.dumps(found, indent=0, ensure_ascii=False, sort_keys=True) + "\n")
        print(result["state"], mutant.name, result.get("by", ""), flush=True)

    run(mutants, args.timeout, note)
    PAGE.write_text(page(read(), found))


def commit() -> str:
    """The last commit that changed the code or the tests."""

    def git(*words: str) -> str:
        command = ["git", *words, "--", "tokencomp", "kernels", "tests"]
        return subprocess.check_output(command, cwd=ROOT, text=True).strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("log", "-1", "--format=%h", "--abbrev=8") + ("+dirty" if changed else "")


if __name__ == "__main__":
    main()
    os._exit(0)  # children have shared its threads
