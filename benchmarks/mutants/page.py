"""The page of the mutants: killed and survived per area."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.mutants.run import KILLED, STALE, SURVIVED, Mutant

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
