"""`tokencomp list`: reducers, models and their options, read from the registries."""

from __future__ import annotations

import dataclasses
import inspect
import json
from importlib.metadata import version
from typing import Annotated, Any

import typer

WHAT = ("all", "reducers", "models")


def command(
    what: Annotated[str, typer.Argument(help="reducers, models, all, or one reducer.")] = "all",
) -> None:
    """List reducers with their options, and models; or say what one reducer does."""
    from rich.console import Console

    from tokencomp.errors import unknown_name
    from tokencomp.reducers.registry import available_reducers

    console, reducers = Console(), available_reducers()
    if what in reducers:
        typer.echo(inspect.getdoc(reducers[what]))
        return
    if what not in WHAT:
        raise unknown_name("list", what, [*WHAT, *reducers])
    if what != "models":
        _print_reducers(console)
    if what != "reducers":
        _print_models(console)
        _print_types(console)


def _print_reducers(console: Any) -> None:
    """Every registered reducer, then the input baselines of the benchmark commands."""
    from rich.markup import escape

    from tokencomp.cli._tables import print_table
    from tokencomp.evaluation.settings import INPUT_BASELINES
    from tokencomp.method import DEFAULT_REDUCER
    from tokencomp.reducers.registry import available_reducers
    from tokencomp.serving.servable import servable

    names, safe, rows = ("name", "stage", "vLLM", "what it does, and its options"), servable(), []
    for name, cls in available_reducers().items():
        options = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(cls))
        about = escape(cls.summary) + (f"\n[dim]{escape(options)}[/]" if options else "")
        label = f"[bold]{name}[/]" + (" (default)" if name == DEFAULT_REDUCER else "")
        vllm = "Qwen" if cls.traits.decides else (safe[name] or "yes") if name in safe else "–"
        rows.append((label, _stage(cls), vllm, about))
    print_table(console, names, rows, wrapped=names[2:], title="Reducers")
    console.print(
        '[dim]"auto" is the default. It merges on transformers and mlx-vlm, and on vLLM '
        "that is started with --merge auto; otherwise vLLM drops, and SGLang always does. Options: "
        '--reducer "NAME(OPTION=VALUE,...)".[/]\n'
    )
    inputs = [(f"[bold]{name}[/]", "input", "–", text) for name, text in INPUT_BASELINES.items()]
    title = "Baselines on the input, for eval, demo and profile alone"
    print_table(console, names, inputs, wrapped=names[2:], title=title)
    console.print()


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return _short(field.default)
    made = field.default_factory
    return "required" if made is dataclasses.MISSING else _short(made())


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _stage(cls: Any) -> str:
    """Where it acts at ratio 0.75 in a 28-layer decoder: entry, layers, or both; or tower."""
    from tokencomp.errors import TokenCompError

    try:
        plan = cls().plan(0.75, 28)
    except (TokenCompError, TypeError):  # needs weights or required options
        return "entry"
    if cls.traits.decides:
        return "tower"
    parts = ["entry"] if plan.entry is not None else []
    return " + ".join(parts + (["layers"] if plan.layer_stages else []))


def _print_models(console: Any) -> None:
    """Every family: its embedded models, model types, stages, and tested releases."""
    from rich.text import Text

    from tokencomp.adapters.registry import available_models
    from tokencomp.cli._tables import print_table
    from tokencomp.inputs import packaged
    from tokencomp.torchlib.compat import tested_with

    types: dict[Any, list[str]] = {}
    for model_type, cls in available_models().items():
        types.setdefault(cls, []).append(model_type)
    embedded = {}
    for name in packaged.available_models():
        config = json.loads((packaged.model_path(name) / "config.json").read_text())
        embedded[name] = str(config.get("model_type"))
    rows = []
    for cls, names in sorted(types.items(), key=lambda item: item[0].family):
        own = "".join(f"\n[dim]{name}[/]" for name, kind in embedded.items() if kind in names)
        releases = {release for name in names for release in tested_with(name)}
        ordered = sorted(releases, key=lambda release: [int(part) for part in release.split(".")])
        family = Text.from_markup(f"[bold]{cls.family}[/]{own}")
        rows.append((family, ", ".join(names), stages(names[0]), ", ".join(ordered)))
    columns = ("family", "model_type", "stages", "transformers")
    others = [name for name, kind in embedded.items() if kind not in available_models()]
    caption = (
        "transformers: releases with exactness tests. Below a family: the embedded model. "
        f"Embedded models of other types: {', '.join(others)}."
    )
    print_table(console, columns, rows, wrapped=columns[1:], gap=1, title="Models", caption=caption)


def stages(model_type: str) -> str:
    """Where reducers may act with the default config of a model type."""
    from transformers import AutoConfig

    from tokencomp.adapters.structure import deepstack_layers

    try:
        first = max(1, deepstack_layers(AutoConfig.for_model(model_type)))
    except ValueError:  # a class of ours that is not imported yet
        first = 1
    return f"entry, layers >= {first}"


def _print_types(console: Any) -> None:
    """All model types by status, from the results that `patch` uses."""
    from rich.markup import escape

    from tokencomp.adapters.verified import STATUSES, TESTED, load, nearest

    installed = version("transformers")
    table = load(nearest(installed))
    release = table["transformers"]
    console.print(f"\n[bold]Conformance on transformers {release}[/]")
    if installed != release:
        console.print(f"transformers {installed} has no results and uses these.")
    for status in STATUSES:
        names = [name for name, row in table["types"].items() if row["status"] == status]
        console.print(f"[bold]{status}[/] ({len(names)}): {escape(', '.join(names))}")
    console.print(
        "[dim]Unverified types need patch(..., verify=True), which checks a tiny copy, but for "
        f"{', '.join(sorted(TESTED))}, tested with a real tower. `patch` says why it refuses.[/]"
    )
