"""`tokencomp list`: reducers, models and their options, read from the registries."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._catalogue import stored, write

WHAT = ("reducers", "models")


def command(
    what: Annotated[str, typer.Argument(help="reducers, models, or all.")] = "all",
    as_json: opt.Json = False,
) -> None:
    """List reducers with their options, and the models that can be compressed."""
    from tokencomp.errors import unknown_name

    if what not in ("all", *WHAT):
        raise unknown_name("list", what, ("all", *WHAT))
    known = stored()
    rows: dict[str, Any] = {
        name: MAKERS[name]() if known is None else known[name]
        for name in WHAT
        if what in ("all", name)
    }
    if "models" in rows:
        rows["models"] = with_embedded(rows["models"])
        rows["types"] = types()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    console = Console()
    if "reducers" in rows:
        _print_reducers(console, rows["reducers"])
    if "models" in rows:
        _print_models(console, rows["models"])
        _print_types(console, rows["types"])


def reducers() -> list[dict[str, Any]]:
    """Every registered reducer, then the input baselines of the benchmark commands."""
    import dataclasses

    from tokencomp.evaluation.settings import INPUT_BASELINES
    from tokencomp.reducers.registry import available_reducers
    from tokencomp.serving.servable import servable

    rows, safe = [], servable()
    for name, cls in available_reducers().items():
        options = {f.name: _default(f) for f in dataclasses.fields(cls)}
        rows.append(_row(name, cls.summary, _stage(cls), options, safe.get(name)))
    rows += [_row(name, summary, "input") for name, summary in INPUT_BASELINES.items()]
    return rows


def _row(
    name: str,
    summary: str,
    stage: str,
    options: dict[str, Any] | None = None,
    safe_with: str | None = None,
) -> dict[str, Any]:
    """`safe_with`: with which options servers can run it; "" for all, None for none."""
    from tokencomp.method import DEFAULT_REDUCER

    return {
        "name": name,
        "summary": summary,
        "stage": stage,
        "serving_safe": safe_with == "",
        "serving_safe_with": safe_with or "",
        "default": name == DEFAULT_REDUCER,
        "options": options or {},
    }


def _default(field: Any) -> Any:
    import dataclasses

    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required"


def _stage(cls: Any) -> str:
    """Where it acts at ratio 0.75 in a 28-layer decoder: entry, layers, or both."""
    from tokencomp.errors import TokenCompError

    try:
        plan = cls().plan(0.75, 28)
    except (TokenCompError, TypeError):  # needs weights or required options
        return "entry"
    parts = ["entry"] if plan.entry is not None else []
    return " + ".join(parts + (["layers"] if plan.layer_stages else []))


def models() -> list[dict[str, Any]]:
    """Every family: model types, stages, signals, positions, tested releases."""
    from tokencomp.adapters.registry import available_models
    from tokencomp.torchlib.compat import tested_with

    rows: dict[type, dict[str, Any]] = {}
    for model_type, cls in available_models().items():
        row = rows.setdefault(
            cls,
            {
                "family": cls.family,
                "model_types": [],
                "stages": ["entry", f"layers >= {_first_layer(model_type)}"],
                "signals": list(cls.signals),
                "positions": "M-RoPE" if cls.mrope else "1-D",
                "transformers": [],
            },
        )
        row["model_types"].append(model_type)
        row["transformers"] = sorted({*row["transformers"], *tested_with(model_type)}, key=_numbers)
    return sorted(rows.values(), key=lambda r: r["family"])


def with_embedded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, each with the names of its embedded models."""
    from tokencomp.inputs.packaged import available_models

    kinds = {name: _model_type(name) for name in available_models()}
    return [
        {**row, "embedded": [n for n, kind in kinds.items() if kind in row["model_types"]]}
        for row in rows
    ]


def types() -> dict[str, Any]:
    """Conformance of all model types, from the results that `patch` goes by."""
    from tokencomp.adapters.verified import load, nearest
    from tokencomp.conformance.table import short

    return short(load(nearest(version("transformers"))))


MAKERS = {"reducers": reducers, "models": models}


def _first_layer(model_type: str) -> int:
    """Earliest layer stage with the default config of a model type."""
    from transformers import AutoConfig

    from tokencomp.adapters.structure import deepstack_layers

    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:  # a class of ours that is not imported yet
        return 1
    return max(1, deepstack_layers(config))


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def _model_type(name: str) -> str:
    from tokencomp.inputs.packaged import model_path

    return str(json.loads((model_path(name) / "config.json").read_text()).get("model_type"))


def _print_reducers(console: Any, rows: list[dict[str, Any]]) -> None:
    inputs = [row for row in rows if row["stage"] == "input"]
    _print_table(console, "Reducers", [row for row in rows if row not in inputs])
    console.print('[dim]"auto" is the default. Set options with --set NAME=VALUE.[/]\n')
    _print_table(console, "Baselines on the input, for eval, demo and profile alone", inputs)
    console.print()


def _print_table(console: Any, title: str, rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    from tokencomp.cli import _tables

    table = _tables.table(title=title)
    for name in ("name", "stage", "vLLM", "what it does, and its options"):
        width = 14 if name == "vLLM" else None
        table.add_column(name, overflow="fold", no_wrap=name in ("name", "stage"), max_width=width)
    for row in rows:
        name = f"[bold]{row['name']}[/]" + (" (default)" if row["default"] else "")
        options = ", ".join(f"{k}={_short(v)}" for k, v in row["options"].items())
        safe = "yes" if row["serving_safe"] else row["serving_safe_with"] or "–"
        about = escape(row["summary"]) + (f"\n[dim]{escape(options)}[/]" if options else "")
        table.add_row(name, row["stage"], safe, about)
    console.print(table)


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print_models(console: Any, rows: list[dict[str, Any]]) -> None:
    from tokencomp.cli import _tables

    names = ("family", "model_type", "positions", "stages", "signals", "transformers")
    table = _tables.table(*names, gap=1, title="Models", overflow="fold")
    for row in rows:
        own = "".join(f"\n[dim]{name}[/]" for name in row["embedded"])
        table.add_row(
            f"[bold]{row['family']}[/]{own}",
            ", ".join(row["model_types"]),
            row["positions"],
            ", ".join(row["stages"]),
            ", ".join(row["signals"]),
            ", ".join(row["transformers"]),
        )
    console.print(table)
    console.print(
        "[dim]transformers: releases that the exactness tests run on. Below a family: the embedded "
        "model.[/]"
    )


def _print_types(console: Any, table: dict[str, Any]) -> None:
    """The types by status, without what the table of families shows."""
    from rich.markup import escape

    from tokencomp.adapters.verified import TESTED
    from tokencomp.conformance.table import STATUSES

    release, installed = table["transformers"], version("transformers")
    console.print(f"\n[bold]Conformance on transformers {release}[/]")
    if installed != release:
        console.print(f"transformers {installed} has no results of its own and takes these.")
    for status in STATUSES:
        names = [name for name, row in table["types"].items() if row["status"] == status]
        console.print(f"[bold]{status}[/] ({len(names)}): {escape(', '.join(names))}")
    console.print(
        "[dim]Unverified types need patch(..., verify=True), which checks a tiny copy, but for "
        f"{', '.join(sorted(TESTED))}, tested with a real tower. "
        "`tokencomp doctor --conformance` repeats the run.[/]"
    )


if __name__ == "__main__":
    write({name: make() for name, make in MAKERS.items()})
