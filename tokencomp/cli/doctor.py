"""`tokencomp doctor`: what is installed, what will work, and a live self-check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.inputs.packaged import DEFAULT_MODEL


def command(
    types: Annotated[
        list[str] | None, typer.Argument(help="Model types for --conformance; none: all.")
    ] = None,
    model: opt.Model = DEFAULT_MODEL,
    device: opt.Device = "cpu",
    as_json: opt.Json = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the live self-check.")] = False,
    conformance: Annotated[
        bool,
        typer.Option(
            "--conformance",
            help="Build a tiny random model of every multimodal type of the installed "
            "transformers, and compare compression with its reference.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the conformance results to this JSON file."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write them as a Markdown page as well.")
    ] = None,
) -> None:
    """Check versions, attention backend, kernels and GPU, and compress a real prompt.

    Exit code 1 if anything is broken; with --conformance, if a type does worse than in the results
    that the package carries for this transformers release, or for the nearest one.
    """
    if conformance:
        raise typer.Exit(_conformance(types or [], as_json, output, page))
    if types or output or page:
        raise typer.BadParameter("TYPES, --output and --page belong to --conformance.")
    from tokencomp.cli._doctor import environment_checks, facts, model_checks

    report: dict[str, Any] = {"facts": facts()}
    checks = environment_checks()
    if not quick:
        checks += model_checks(model, device)
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


def _conformance(types: list[str], as_json: bool, output: Path | None, page: Path | None) -> int:
    """Run conformance, show and write the results; return the exit code.

    It is 1 if a type does worse than in the results that the package carries.
    """
    from tqdm import tqdm

    from tokencomp.conformance import table
    from tokencomp.conformance.run import check_types, model_classes

    with tqdm(total=len(types) or len(model_classes()), unit="type", file=sys.stderr) as bar:

        def done(name: str, row: dict[str, Any]) -> None:
            bar.set_postfix_str(f"{name}: {row['status']}")
            bar.update()

        results = table.new_table(check_types(types or None, done))
    if output is not None:
        table.save(results, output)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(table.markdown(results), encoding="utf-8")
    worse = table.worse(results)
    if as_json:
        typer.echo(json.dumps({**results, "worse": worse}, indent=2))
    else:
        _show_types(results, worse)
    return 1 if worse else 0


def _show_types(results: dict[str, Any], worse: dict[str, str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from tokencomp.cli import _tables
    from tokencomp.conformance.table import counts, first_sentence

    console = Console()
    title = f"Model types of transformers {results['transformers']}"
    names = ("model type", "status", "error", "effect", "reason")
    rows = _tables.table(*names, gap=1, title=title, overflow="fold")
    colors = {"exact": "green", "entry only": "green", "refused": "yellow", "unverified": "red"}
    for name, row in results["types"].items():
        errors = {k: v for k, v in row["errors"].items() if k not in ("effect", "identity")}
        rows.add_row(
            name,
            f"[{colors[row['status']]}]{row['status']}[/]",
            f"{max(errors.values()):.0e}" if errors else "–",
            f"{row['errors']['effect']:.2g}" if "effect" in row["errors"] else "–",
            escape(first_sentence(row["reason"], 100)),
        )
    console.print(rows)
    console.print("\n" + ", ".join(f"{n} {status}" for status, n in counts(results).items()))
    for name, change in worse.items():
        console.print(f"[red]{name}: {escape(change)}[/]")
