"""`tokencomp report`: a page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokencomp.cli import _options as opt


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders of run folders.", exists=True)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page.")] = Path(
        "tokencomp-report.html"
    ),
    as_json: opt.Json = False,
) -> None:
    """Retention with paired intervals, McNemar against random, plots and pictures in one file."""
    from tokencomp.pages import report

    table = report.lines(report.find_runs(runs))
    report.write(table, output)
    if as_json:
        typer.echo(report.as_json(table))
        return
    from rich.console import Console
    from rich.table import Table

    from tokencomp.cli._tables import retained

    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("method", "ratio", "reached", "items", "accuracy", "retention", "p vs random"):
        shown.add_column(name, no_wrap=True)
    for line in table:
        kept, rival = line.retention, line.against_random
        shown.add_row(
            line.run.label,
            f"{line.run.ratio:g}",
            f"{line.run.mean('ratio'):.3f}",
            str(len(line.run.answered)),
            f"{line.accuracy:.1%}",
            retained(kept),
            f"{rival.p:.2g}" if rival else "–",
        )
    console = Console()
    console.print(shown)
    console.print(f"\nReport: [bold]{output}[/]")
