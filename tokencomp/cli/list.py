"""`tokencomp list`: reducers, models and their options, read from the registries."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._catalogue import WHAT, types, with_embedded


def command(
    what: Annotated[str, typer.Argument(help="reducers, models, or all.")] = "all",
    as_json: opt.Json = False,
) -> None:
    """List reducers with their options, and the models that can be compressed."""
    from tokencomp.errors import unknown_name

    if what not in ("all", *WHAT):
        raise unknown_name("list", what, ("all", *WHAT))
    listed: dict[str, Any] = {name: rows() for name, rows in WHAT.items() if what in ("all", name)}
    if "models" in listed:
        listed["models"] = with_embedded(listed["models"])
        listed["types"] = types()
    if as_json:
        typer.echo(json.dumps(listed, indent=2))
        return
    from rich.console import Console

    console = Console()
    if "reducers" in listed:
        _print_reducers(console, listed["reducers"])
    if "models" in listed:
        _print_models(console, listed["models"])
        _print_types(console, listed["types"])


def _print_reducers(console: Any, rows: list[dict[str, Any]]) -> None:
    inputs = [row for row in rows if row["stage"] == "input"]
    _print_table(console, "Reducers", [row for row in rows if row not in inputs])
    console.print('[dim]"auto" is the default. Set options with --set NAME=VALUE.[/]\n')
    _print_table(console, "Baselines on the input, for eval, demo and profile alone", inputs)
    console.print()


def _print_table(console: Any, title: str, rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    from tokencomp.cli._tables import print_table

    names, cells = ("name", "stage", "vLLM", "what it does, and its options"), []
    for row in rows:
        name = f"[bold]{row['name']}[/]" + (" (default)" if row["default"] else "")
        options = ", ".join(f"{k}={_short(v)}" for k, v in row["options"].items())
        safe = "yes" if row["serving_safe"] else row["serving_safe_with"] or "–"
        about = escape(row["summary"]) + (f"\n[dim]{escape(options)}[/]" if options else "")
        cells.append((name, row["stage"], safe, about))
    print_table(console, names, cells, wrapped=names[2:], title=title)


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print_models(console: Any, rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from tokencomp.cli._tables import print_table

    names = ("family", "model_type", "stages", "transformers")
    cells = []
    for row in rows:
        own = "".join(f"\n[dim]{name}[/]" for name in row["embedded"])
        family = Text.from_markup(f"[bold]{row['family']}[/]{own}")
        lists = (", ".join(row[key]) for key in ("model_types", "stages", "transformers"))
        cells.append((family, *lists))
    caption = "transformers: releases that the exactness tests run on. --json has positions and "
    print_table(
        console,
        names,
        cells,
        wrapped=names[1:],
        gap=1,
        title="Models",
        caption=caption + "signals. Below a family: the embedded model.",
    )


def _print_types(console: Any, table: dict[str, Any]) -> None:
    """The types by status, without what the table of families shows."""
    from rich.markup import escape

    from tokencomp.adapters.verified import STATUSES, TESTED

    release, installed = table["transformers"], version("transformers")
    console.print(f"\n[bold]Conformance on transformers {release}[/]")
    if installed != release:
        console.print(f"transformers {installed} has no results of its own and takes these.")
    for status in STATUSES:
        names = [name for name, row in table["types"].items() if row["status"] == status]
        console.print(f"[bold]{status}[/] ({len(names)}): {escape(', '.join(names))}")
    console.print(
        "[dim]Unverified types need patch(..., verify=True), which checks a tiny copy, but for "
        f"{', '.join(sorted(TESTED))}, tested with a real tower. --json has the reasons.[/]"
    )
