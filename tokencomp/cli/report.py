"""`tokencomp report`: a page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders of run folders.", exists=True)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page.")] = Path(
        "tokencomp-report.html"
    ),
    table_files: Annotated[
        list[Path] | None,
        typer.Option("--table", help="Also write the table: a .csv or .tex file; may be repeated."),
    ] = None,
) -> None:
    """Retention with paired intervals, McNemar against random, plots and pictures in one file."""
    from tokencomp.evaluation.group_runs import find_runs
    from tokencomp.pages import report
    from tokencomp.pages import table_file as files

    for file in table_files or ():
        files.check_suffix(file)
    table = report.lines(find_runs(runs))
    report.write(table, output)
    for file in table_files or ():
        files.write_table(table, file)
    from rich.console import Console

    from tokencomp.cli._tables import print_lines

    console = Console()
    print_lines(console, table)
    console.print(f"\nReport: [bold]{output}[/]")
