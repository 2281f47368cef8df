"""How many small bugs the tests see.

    python -m benchmarks.mutants                    # → results.json, README.md
    python -m benchmarks.mutants --area plan --missing
    python -m benchmarks.mutants --report           # only the page

A mutant is a changed expression (mutants.json) with the tests that should fail. A run by hand, not
by CI: half an hour to some hours on one core.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import linecache
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = Path(__file__).with_name("mutants.json")
KILLED, SURVIVED, STALE, TIMEOUT, BROKEN = "killed", "survived", "stale", "timeout", "broken"
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # exit codes of pytest


@dataclass(frozen=True)
class Mutant:
    """A small bug.

    Attributes
    ----------
    area
        The part of the code, for the table.
    file
        Path from the root of the checkout.
    old, new
        A text that occurs once in the file, and what replaces it.
    tests
        Arguments of pytest: the tests that should fail.
    why
        What goes wrong for a user.
    """

    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    @property
    def name(self) -> str:
        """What identifies it in the results, whichever line it is on."""
        return f"{self.file}: {self.old} → {self.new}"

    def source(self) -> str | None:
        """The changed file; None if the text does not occur once."""
        text = (ROOT / self.file).read_text()
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def read() -> list[Mutant]:
    rows = json.loads(MUTANTS.read_text())
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


class _Changed(SourceFileLoader):
    """Loads a module from a text in place of its file."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> Any:
        # Triton reads the source of its kernels; an entry without a time is not looked up again.
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.path] = (len(self.text), None, lines, self.path)
        return compile(self.text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Gives one file of the checkout a changed text, under whichever name it is imported."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is None:
                continue
            if spec.origin is None or Path(spec.origin).resolve() != self.path:
                return None
            loader = _Changed(fullname, str(self.path), self.text)
            places = spec.submodule_search_locations
            return importlib.util.spec_from_file_location(
                fullname, self.path, loader=loader, submodule_search_locations=places
            )
        return None


class _FirstFailure:
    """A plugin of pytest that remembers the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def _child(tests: Sequence[str], mutant: Mutant | None, write: int) -> int:
    """Run tests, and write the name of the first that failed to a pipe."""
    import pytest  # the page is built without it

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.dont_write_bytecode = True
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(ROOT / mutant.file, mutant.source() or ""))
    first = _FirstFailure()
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly"]
    code = int(pytest.main([*options, *tests], plugins=[first]))
    os.write(write, first.name.encode())
    return code


def run_tests(tests: Sequence[str], mutant: Mutant | None, limit: float) -> tuple[int | None, str]:
    """Exit code of pytest in a child, or None after `limit` seconds; and the first failed test."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            code = _child(tests, mutant, write)
        finally:
            os._exit(code)
    os.close(write)
    done, code = _wait(child, limit)
    name = os.read(read, 10_000).decode() if done else ""
    os.close(read)
    return code, name


def _wait(child: int, limit: float) -> tuple[bool, int | None]:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return True, os.waitstatus_to_exitcode(status)
        time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, None


def judge(mutant: Mutant, limit: float) -> dict[str, Any]:
    """What the tests say about a mutant.

    A test that fails with it is run again without it: a mutant is killed only where that passes.
    """
    begin = time.monotonic()
    if mutant.source() is None:
        return {"state": STALE}
    code, failed = run_tests(mutant.tests, mutant, limit)
    state = {None: TIMEOUT, PASSED: SURVIVED, FAILED: KILLED, INTERRUPTED: KILLED}.get(code, BROKEN)
    if state is KILLED:
        again = [failed, *_options(mutant.tests)] if failed else mutant.tests
        state = KILLED if run_tests(again, None, limit)[0] == PASSED else BROKEN
    return {"state": state, "by": failed, "seconds": round(time.monotonic() - begin, 1)}


def _options(tests: Sequence[str]) -> list[str]:
    """`-m …` among arguments of pytest."""
    return list(tests[tests.index("-m") :][:2]) if "-m" in tests else []


def run(mutants: Sequence[Mutant], limit: float, note: Callable[[Mutant, dict], None]) -> None:
    """Judge mutants one by one; `note` gets each with what was found."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py, before torch is imported
    os.chdir(ROOT)
    for name in ("torch", "transformers", "torch._dynamo", "transformers.generation.utils"):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert not any(name.split(".")[0] == "tokencomp" for name in sys.modules)
    for mutant in mutants:
        note(mutant, judge(mutant, limit))


RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).with_name("README.md")
HEAD = """# Mutation score

`python -m benchmarks.mutants`. A mutant is one changed expression, a bug of a kind that was made
here or that is easy to make. It runs against the tests that should see it, which
[mutants.json](mutants.json) names. It counts as killed if one of them fails with it and passes
without it. "Survived" says that those tests pass, not that every test of the project does. Slow
tests (`-m long`) run only for Triton. Edits that turned out to change nothing were taken out.
Commits of the runs: {commits}.

{killed} of {run} are killed.
"""


def page(mutants: Sequence[Mutant], found: Mapping[str, Mapping[str, Any]]) -> str:
    states = {m: found.get(m.name, {}).get("state", "not run") for m in mutants}
    counts = Counter((m.area, state) for m, state in states.items())
    others = [s for s in dict.fromkeys(states.values()) if s not in (KILLED, SURVIVED)]
    columns = [KILLED, SURVIVED, *others]
    rows = [
        [area, *(counts[area, state] for state in columns)]
        for area in dict.fromkeys(m.area for m in mutants)
    ]
    rows.append(["all", *(sum(counts[row[0], s] for row in rows) for s in columns)])
    commits = sorted({found[m.name].get("commit", "") for m in mutants if m.name in found} - {""})
    killed = Counter(states.values())
    parts = [
        HEAD.format(
            commits=", ".join(commits) or "none",
            killed=killed[KILLED],
            run=killed[KILLED] + killed[SURVIVED],
        ),
        _table(["area", *columns], rows),
    ]
    survivors = [
        [m.file, f"{_code(m.old)} → {_code(m.new)}", m.why, " ".join(m.tests)]
        for m, state in states.items()
        if state == SURVIVED
    ]
    if survivors:
        head = ["file", "edit", "what goes wrong", "tests that pass"]
        parts += ["\n## Survivors\n", _table(head, survivors)]
    if STALE in others:
        parts.append("\n## To be restated: the code has changed\n")
        parts += [f"- {m.file}: {_code(m.old)}" for m, s in states.items() if s == STALE]
    return "\n".join(parts) + "\n"


def _code(text: str) -> str:
    """Code in a cell of a table, on one line."""
    return "`" + " ".join(text.split()).replace("|", "\\|") + "`" if text.strip() else "nothing"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


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
