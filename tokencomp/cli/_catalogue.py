"""What `tokencomp list` shows: what the registries know of reducers and models."""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from typing import Any


def reducers() -> list[dict[str, Any]]:
    """Every registered reducer, then the input baselines of the benchmark commands."""
    from tokencomp.evaluation.settings import INPUT_BASELINES
    from tokencomp.method import DEFAULT_REDUCER
    from tokencomp.reducers.registry import available_reducers
    from tokencomp.serving.servable import servable

    safe = servable()
    rows = [
        {
            "name": name,
            "summary": cls.summary,
            "stage": _stage(cls),
            "serving_safe": safe.get(name) == "",
            "serving_safe_with": safe.get(name, ""),
            "default": name == DEFAULT_REDUCER,
            "options": {f.name: _default(f) for f in dataclasses.fields(cls)},
        }
        for name, cls in available_reducers().items()
    ]
    none = {"serving_safe": False, "serving_safe_with": "", "default": False, "options": {}}
    for name, summary in INPUT_BASELINES.items():
        rows.append({"name": name, "summary": summary, "stage": "input", **none})
    return rows


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return "required" if field.default_factory is dataclasses.MISSING else field.default_factory()


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
    """Status of all model types and its reason, from the results that `patch` goes by."""
    from tokencomp.adapters.verified import load, nearest

    table = load(nearest(metadata.version("transformers")))
    rows = {
        name: {"status": row["status"], "reason": row["reason"]}
        for name, row in table["types"].items()
    }
    return {"transformers": table["transformers"], "types": rows}


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


WHAT = {"reducers": reducers, "models": models}
