"""Published numbers come from committed code.

Scripts that write results into `benchmarks/` call `published_from` first. It refuses a checkout
whose code has uncommitted changes, unless `--allow-dirty` is given, which marks the results.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import environment as environment
from tokencomp.evaluation.environment import git
from tokencomp.storage import write_text

FOLDER = Path(__file__).resolve().parent
OUTPUTS = (".json", ".jsonl", ".md", ".csv", ".jpg")
MARK = "publishable"
TABLES = "../README.md#tables-as-csv"
"""Where a page of a folder says how its tables become CSV files."""
LOST = {"59fd6962", "714d7b9e", "9c085507", "a7260a95", "cc934109"}
"""Commits that results name and the repository has not: their branches were rewritten."""
WIDTH = 400
"""Columns of stored JSON: the line of a setting or a case."""


def parser(
    doc: str | None, out: Path | None = None, flag: str = "--out", report: bool = True
) -> argparse.ArgumentParser:
    """Options that all benchmarks share: where the files go, `--report` and `--allow-dirty`.

    `doc` is the docstring of the script, `flag` the name of the option for `out`.
    """
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(flag, type=Path, default=out, help=f"where results go (default: {out})")
    if report:
        result.add_argument("--report", action="store_true", help="only rebuild the page")
    result.add_argument(
        "--allow-dirty",
        action="store_true",
        help="run although the checkout has uncommitted changes; the results are marked as "
        "unpublishable",
    )
    return result


def write(path: Path, value: Any) -> None:
    """Write JSON whose lines hold as much as fits into `WIDTH` columns.

    Indented at all levels, files of results would be mostly spaces.
    """
    write_text(path, dense(value) + "\n")


def dense(value: Any, depth: int = 0) -> str:
    """The text of `write`."""
    text = json.dumps(value, default=str, separators=(",", ":"))
    if len(text) <= WIDTH or not isinstance(value, dict | list):
        return text
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}:{dense(v, depth + 1)}" for k, v in value.items()]
        first, last = "{}"
    else:
        parts, (first, last) = [dense(v, depth + 1) for v in value], "[]"
        if not any(isinstance(v, dict | list) for v in value):
            parts = _filled(parts)
    lines = [f"{' ' * (depth + 1)}{part}" for part in parts]
    return "\n".join([first, ",\n".join(lines), f"{' ' * depth}{last}"])


def _filled(parts: Iterable[str]) -> list[str]:
    """Numbers and words, as many in a line as fit."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) < WIDTH:
            lines[-1] += f",{part}"
        else:
            lines.append(part)
    return lines


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---", right: int = 0
) -> str:
    """Markdown table with `rule` below the head; the last `right` columns are right-aligned."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    rules = [rule] * (len(head) - right) + [f"{rule}:"] * right
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def interval_columns(name: str, value: Any) -> dict[str, float | None]:
    """Cells of a statistic and of its interval, empty for None."""
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {name + end: None if value is None else getattr(value, p) for end, p in parts.items()}


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, for pandas: columns in order of appearance, None as an empty cell.

    Floats have four decimals, or three digits where these would show none.
    """
    columns = list(dict.fromkeys(name for record in records for name in record))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _short(v) for k, v in record.items()} for record in records)
    return file.getvalue()


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if not isinstance(value, float):
        return value
    return f"{round(value, 4):g}" if round(value, 4) or not value else f"{value:.2e}"


def read(path: Path) -> Any:
    """A JSON file of results."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON Lines file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def provenance(facts: dict[str, Any]) -> str:
    """What `environment` returned as one line for a page; of older counts less is known."""
    parts = [f"`{facts['command']}`"] if "command" in facts else []
    if hardware := facts.get("hardware"):
        threads = f"{hardware['cpu']}, {hardware['threads']} threads"
        parts.append(", ".join(hardware.get("gpus", ())) or threads)
    if installed := facts.get("versions"):
        names = [n for n in ("torch", "transformers", "triton", "tokencomp") if n in installed]
        parts.append(", ".join(f"{n} {installed[n]}" for n in names))
    parts.append(version(facts["commit"]))
    mark = [] if facts.get(MARK, True) else ["**not for publication: uncommitted changes**"]
    return "; ".join([*parts, *([facts["date"][:10]] if "date" in facts else []), *mark])


def commits(runs: Iterable[Mapping[str, Any]]) -> str:
    """Code and date of several runs; their commands are in the result file."""
    known = dict.fromkeys(f"{version(run['commit'])}, {run['date'][:10]}" for run in runs)
    return "; ".join(known)


def version(commit: str | None) -> str:
    """The code behind a result in words, which say so where nobody can look it up."""
    head, _, dirty = str(commit).partition("+")
    notes = ["uncommitted code"] * bool(dirty)
    notes += ["commit not in the repository"] * (head[:8] in LOST)
    return f"commit {head[:12]}" + (f" (**{', '.join(notes)}**)" if notes else "")


def changed_code(root: Path) -> list[str]:
    """Files with uncommitted changes that can change a number.

    Result files and pages under `benchmarks/` are left out: a run that stopped after some models
    has changed them itself, and has to be able to go on.
    """
    status = git(root, "status", "--porcelain", "--untracked-files=no")
    paths = [line[3:].split(" -> ")[-1].strip('"') for line in status.splitlines()]
    return [p for p in paths if not (p.startswith("benchmarks/") and p.endswith(OUTPUTS))]


def published_from(out: Path, allow_dirty: bool, root: Path = FOLDER.parent) -> dict[str, Any]:
    """Check the checkout before a run; returns the facts that go into its provenance.

    Parameters
    ----------
    out
        Where results will be written. Results outside of `benchmarks/` are never published, so
        they need no clean checkout; they are marked like those of `--allow-dirty`.
    allow_dirty
        From the command line.
    root
        The checkout.

    Returns
    -------
    dict
        `commit`, and `publishable: False` where the checkout is not clean.

    Raises
    ------
    OptionError
        The code has uncommitted changes, or its commit is unknown.
    """
    try:
        head, changed = git(root, "rev-parse", "HEAD").strip(), changed_code(root)
    except (OSError, subprocess.SubprocessError):
        head, changed = "", []
    if head and not changed:
        return {"commit": head}
    inside = (root / "benchmarks").resolve() in (out.resolve(), *out.resolve().parents)
    if inside and not allow_dirty:
        reason = f"uncommitted changes in {', '.join(changed[:3])}" if head else "no known commit"
        raise OptionError(
            f"results in {out} are published, and this checkout has {reason}. Commit the changes, "
            "choose another output folder, or use --allow-dirty, which marks the results as "
            "unpublishable."
        )
    return {"commit": f"{head}+dirty" if head else None, MARK: False}
