"""`tokencomp doctor`: what is installed, what will work, and a live self-check."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from tokencomp.cli import _options as opt
from tokencomp.inputs.packaged import DEFAULT_MODEL


def command(
    model: opt.Model = DEFAULT_MODEL,
    device: opt.Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check versions, attention backend, kernels and GPU, and compress a real prompt.

    On a GPU each kernel is compared with plain PyTorch again. Exit code 1 if anything is broken.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tokencomp.cli._doctor import environment_checks, facts, model_checks

    checks, console = [*environment_checks(), *model_checks(model, device)], Console()
    broken = any(check.ok is False for check in checks)
    if as_json:
        typer.echo(json.dumps({**facts(), "checks": [asdict(check) for check in checks]}, indent=2))
        raise typer.Exit(int(broken))
    marks = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}
    known = [(f"[bold]{name}[/]", escape(value)) for name, value in facts().items()]
    found = [(marks[c.ok], f"[bold]{escape(c.name)}[/]", escape(c.detail)) for c in checks]
    for title, rows in (("Environment", known), ("\nChecks", found)):
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if broken:
        console.print("\n[red]Something is broken.[/]")
        raise typer.Exit(1)
    console.print("\n[green]Everything works.[/]")
