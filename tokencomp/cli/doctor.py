"""`tokencomp doctor`: what is installed, what will work, and a live self-check."""

from __future__ import annotations

import json
from typing import Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.inputs.packaged import DEFAULT_MODEL


def command(
    model: opt.Model = DEFAULT_MODEL,
    device: opt.Device = "cpu",
    as_json: opt.Json = False,
) -> None:
    """Check versions, attention backend, kernels and GPU, and compress a real prompt.

    Exit code 1 if anything is broken.
    """
    from tokencomp.cli._doctor import environment_checks, facts, model_checks

    report: dict[str, Any] = {"facts": facts()}
    checks = [*environment_checks(), *model_checks(model, device)]
    report["checks"] = [vars(c) for c in checks]
    report["ok"] = all(c.ok is not False for c in checks)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="Environment", title_justify="left", box=None, show_header=False)
    for name, value in report["facts"].items():
        table.add_row(f"[bold]{name}[/]", escape(str(value)))
    console.print(table)
    marks = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}
    table = Table(title="\nChecks", title_justify="left", box=None, show_header=False)
    for check in report["checks"]:
        table.add_row(
            marks[check["ok"]], f"[bold]{escape(check['name'])}[/]", escape(check["detail"])
        )
    console.print(table)
    good = report["ok"]
    console.print("\n[green]Everything works.[/]" if good else "\n[red]Something is broken.[/]")
