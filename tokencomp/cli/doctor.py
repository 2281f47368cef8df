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

    checks, console = [*environment_checks(), *model_checks(model, device)], Console()
    marks = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}
    known = [(f"[bold]{name}[/]", escape(value)) for name, value in facts().items()]
    found = [(marks[c.ok], f"[bold]{escape(c.name)}[/]", escape(c.detail)) for c in checks]
    for title, rows in (("Environment", known), ("\nChecks", found)):
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if any(check.ok is False for check in checks):
        console.print("\n[red]Something is broken.[/]")
        raise typer.Exit(1)
    console.print("\n[green]Everything works.[/]")
