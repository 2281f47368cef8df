"""`tokencomp doctor`: what is installed, what will work, and a live self-check."""

from __future__ import annotations

import typer

from tokencomp.cli import _options as opt
from tokencomp.inputs.packaged import DEFAULT_MODEL


def command(model: opt.Model = DEFAULT_MODEL, device: opt.Device = "cpu") -> None:
    """Check versions, attention backend, kernels and GPU, and compress a real prompt.

    Exit code 1 if anything is broken.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tokencomp.cli._doctor import environment_checks, facts, model_checks

    checks = [*environment_checks(), *model_checks(model, device)]
    console = Console()
    table = Table(title="Environment", title_justify="left", box=None, show_header=False)
    for name, value in facts().items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)
    marks = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}
    table = Table(title="\nChecks", title_justify="left", box=None, show_header=False)
    for check in checks:
        table.add_row(marks[check.ok], f"[bold]{escape(check.name)}[/]", escape(check.detail))
    console.print(table)
    if any(check.ok is False for check in checks):
        console.print("\n[red]Something is broken.[/]")
        raise typer.Exit(1)
    console.print("\n[green]Everything works.[/]")
