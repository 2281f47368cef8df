"""The table of a report as text: CSV for programs, LaTeX for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.pages.report import Line
from tokencomp.storage import write_text, writing

LATEX = str.maketrans(
    {c: f"\\{c}" for c in "_%&#$"} | {"†": r"$^\dagger$", "<": "$<$", "→": r"$\to$", "–": "--"}
)


def check_suffix(path: Path) -> None:
    """Raise `OptionError` unless the suffix names a table format."""
    if path.suffix not in (".csv", ".tex"):
        raise OptionError(f"--table {path}: the suffix says what is written: .csv or .tex.")


def write_table(table: Sequence[Line], path: Path) -> Path:
    """Write `table` to a .csv or .tex file. Raises `OptionError`."""
    text = as_csv(table) if path.suffix == ".csv" else as_latex(table)
    with writing(path, "--table"):
        return write_text(path, text)


def as_csv(table: Sequence[Line]) -> str:
    """One row per setting; fractions, empty where there is no value."""
    out = io.StringIO()
    rows = [_row(line) for line in table]
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _row(line: Line) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": line.run.label,
        "ratio": line.run.shown_ratio,
        "achieved_ratio": line.run.mean("ratio"),
        "items": len(line.run.answered),
        "failed": len(line.run.failed),
        "accuracy": line.accuracy,
        "flops": line.flops,
        "kv_bytes": line.kv_bytes,
        "departs_from_paper": line.deviation,
    }
    comparisons = line.comparisons
    for name, pair in (
        ("retention", line.retention),
        ("against_full", comparisons.full),
        ("against_random", comparisons.random),
        ("against_downscale", comparisons.downscale),
    ):
        for part, end in (("value", ""), ("low", "_low"), ("high", "_high")):
            row[name + end] = "" if pair is None else getattr(pair, part)
    return {name: "" if value != value else value for name, value in row.items()}


def as_latex(table: Sequence[Line]) -> str:
    """A tabular in the style of booktabs; percentages, 95 % intervals in brackets."""
    rows = [
        (
            line.label,
            str(line.run.shown_ratio),
            f"{line.accuracy:.1%}" if line.run.answered else "--",
            "--" if line.retention is None else str(line.retention),
            "--" if line.comparisons.random is None else str(line.comparisons.random),
            f"{line.flops:.0%}" if line.run.answered else "--",
        )
        for line in table
    ]
    head = ("method", "ratio", "accuracy", "accuracy kept", "points over random", "LLM FLOPs")
    lines = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in (head, *rows)]
    body = [r"\begin{tabular}{lrrrrr}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
    body += [r"\bottomrule", r"\end{tabular}"]
    body += [
        f"% {one.label} at {one.run.shown_ratio} {one.deviation}." for one in table if one.deviation
    ]
    return "\n".join([*body, ""])
