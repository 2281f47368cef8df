"""The public interface as text, to compare it with that of the last release.

    python tests/support/public.py VERSION       # writes tests/public/VERSION.json, at a release

Public are the names of docs/api.md, the commands and their options, the fields of requests, the
keys of plans in JSON, and the names of metrics (docs/support.md, "What is public").
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import tokencomp

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "public"


def interface() -> dict[str, str]:
    """Signature or kind of every public name."""
    return {**python_names(), **commands(), **request_fields(), **plan_keys(), **metrics()}


def python_names() -> dict[str, str]:
    """Names of `import tokencomp` and of docs/api.md, with their signatures."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    paths = [p for p in re.findall(r"^::: (\S+)", page, re.MULTILINE) if p != "tokencomp.errors"]
    names: dict[str, str] = {f"tokencomp.{name}": "name" for name in tokencomp.__all__}
    for path in paths:
        module, _, attribute = path.rpartition(".")
        names |= _described(path, getattr(importlib.import_module(module), attribute))
    errors = importlib.import_module("tokencomp.errors")
    kinds = [name for name in vars(errors) if name.endswith(("Error", "Warning"))]
    return names | {f"tokencomp.errors.{name}": "error" for name in kinds}


def _described(path: str, value: Any) -> dict[str, str]:
    if not inspect.isclass(value):
        return {path: _signature(value)}
    names = {path: _signature(value)}
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    names |= {f"{path}.{f.name}": "field" for f in fields if not f.name.startswith("_")}
    for cls in reversed(value.__mro__):
        if not cls.__module__.startswith("tokencomp"):
            continue
        for name, member in vars(cls).items():
            inner = getattr(member, "__func__", member)
            if not name.startswith("_") and (
                inspect.isfunction(inner) or isinstance(member, property)
            ):
                text = "property" if isinstance(member, property) else _signature(inner)
                names[f"{path}.{name}"] = text
    return names


def _signature(value: Any) -> str:
    """Names, kinds and defaults of parameters; annotations may change."""
    parameters = []
    for parameter in inspect.signature(value).parameters.values():
        default = parameter.default
        plain = default is parameter.empty or isinstance(default, bool | int | float | str | None)
        parameter = parameter.replace(annotation=parameter.empty)
        parameters.append(str(parameter if plain else parameter.replace(default=...)))
    return f"({', '.join(parameters)})"


def commands() -> dict[str, str]:
    """Options and arguments of every command."""
    import typer

    from tokencomp.cli._app import build_app

    names: dict[str, str] = {}

    def walk(command: Any, path: str) -> None:
        names[path] = "command"
        for parameter in command.params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                names[f"{path} {option}"] = parameter.param_type_name
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}")

    walk(typer.main.get_command(build_app()), "tokencomp")
    return names


def request_fields() -> dict[str, str]:
    """Fields of a chat request, and of its object `tokencomp`."""
    from tokencomp.serving.hf.fields import HfChat
    from tokencomp.serving.spec import REQUEST_KEYS

    names = {f"request.{name}": "field" for name in HfChat.model_fields}
    return names | {f"request.tokencomp.{name}": "field" for name in REQUEST_KEYS}


def plan_keys() -> dict[str, str]:
    """Keys of a stage in JSON."""
    from tokencomp.plan.options import OPTIONS

    keys = ("layer", "tower", "fraction", "budget", "reducer", "options", "by_modality", *OPTIONS)
    return {f"plan.{key}": "key" for key in keys}


def metrics() -> dict[str, str]:
    """Prometheus names of the server on transformers, with their kinds."""
    from tokencomp.serving.hf.metrics import Metrics

    collected = {m.name: m for m in Metrics().registry.collect()}
    return {f"metric.{name}": metric.type for name, metric in collected.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    lines = json.dumps(interface(), indent=0, sort_keys=True, ensure_ascii=False)
    (FOLDER / f"{sys.argv[1]}.json").write_text(lines + "\n", encoding="utf-8")
