"""What a server compresses with: its own options, and those of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.serving.cases import SERVABLE

from tokencomp import TowerStage
from tokencomp.errors import OptionError, PlanError, RatioError
from tokencomp.method import Method
from tokencomp.plan.counts import Budget
from tokencomp.reducers.registry import available_reducers, make_reducer
from tokencomp.serving.engines import table
from tokencomp.serving.servable import serving_safe
from tokencomp.serving.spec import ServerOptions

ENGINES = ("hf", "vllm", "sglang")
DECIDING = ("delta", "pixelprune")
HALF: dict[str, Any] = {"ratio": 0.5}
SEEDED = {**HALF, "reducer": "random", "options": {"seed": 7}}
BUDGET, TOWER = {"budget": 64}, {"ratio": 0.75, "tower_ratio": 0.6}
SELECTOR = {"reducer": "selector", "options": {"weights": "/etc/passwd"}}


def resolved(server: Any, request: Any, engine: str = "vllm") -> Method:
    return ServerOptions.parse(server, engine).resolve(request, engine)


# Engines, options of the server and of a request, and what holds then.
TAKEN: list[tuple[tuple[str, ...], Any, Any, dict[str, Any]]] = [
    (ENGINES, HALF, None, {"ratio": 0.5, "budget": None}), (ENGINES, {}, HALF, {"ratio": 0.5}),
    (ENGINES, SEEDED, {"ratio": 0.25}, {"ratio": 0.25, "seed": 7}),
    (ENGINES, SEEDED, {"options": {"seed": 8}}, {"ratio": 0.5, "seed": 8}),
    (ENGINES, SEEDED, {"seed": 8}, {"ratio": 0.5, "seed": 8}),  # as arguments of `patch`
    (ENGINES, HALF, {"options": {"budget": 64}}, {"budget": 64, "ratio": 0}),
    (ENGINES, SEEDED, {"reducer": "uniform"}, {"ratio": 0.5, "name": "uniform"}),
    (ENGINES, SEEDED, {"ratio": 0}, {"active": False}),
    (ENGINES, {**HALF, "reducer": "auto"}, None, {"name": "auto"}),
    *((("hf", "vllm"), {"reducer": name}, None, {"active": True, "ratio": 0, "then": "auto"})
      for name in DECIDING),
    (ENGINES, {**HALF, "ratio": 0.99}, {}, {"ratio": 0.99}),  # above the usual bound of requests
    (ENGINES, {**HALF, "per_request": False}, None, {"ratio": 0.5}),
    (ENGINES, HALF, {"budget": 512, "reducer": "uniform"}, {"budget": 512, "name": "uniform"}),
    (ENGINES, BUDGET, {"reducer": "uniform"}, {"budget": 64}),
    (ENGINES, BUDGET, {"ratio": 0.25}, {"budget": None, "ratio": 0.25}),
    (ENGINES, BUDGET, {"ratio": 0}, {"active": False}),
    (ENGINES, {**BUDGET, "max_ratio": 0.8}, {"reducer": "uniform"}, {"budget": 64}),
    (ENGINES, HALF, {"reducer": None}, {"ratio": 0.5}),
    (("hf", "vllm"), HALF, {"ratio": {"image": 0.5, "video": 0.75}},
     {"ratios": {"image": 0.5, "video": 0.75}}),
    (("hf", "vllm"), TOWER, None, {"dropped_cells": 0.6}),
    (("hf", "vllm"), TOWER, {"ratio": 0.5}, {"dropped_cells": 0.5}),  # never above the ratio
    (("hf", "vllm"), TOWER, {"tower_ratio": 0.0}, {"dropped_cells": 0}),
    (("hf", "vllm"), TOWER, {"tower_ratio": "auto"}, {"dropped_cells": pytest.approx(0.4)}),
    (("hf", "vllm"), TOWER, {"tower_reducer": "random"}, {"tower": "random"}),
    (("hf",), TOWER, {"budget": 8}, {"tower_stage": None}),
    (("hf", "vllm"), {**TOWER, "tower_ratio": "auto"}, {"budget": 8, "reducer": "uniform"},
     {"tower_stage": TowerStage(0, 1.0, make_reducer("kcenter"), budget=Budget(13))}),
    (("hf",), TOWER, {"tower_reducer": "adsc"}, {"tower": "adsc"}),
    (("hf",), TOWER, {"ratio": {"video": 0.5}, "tower_ratio": 0}, {"ratios": {"video": 0.5}}),
    (("hf", "vllm"), {**HALF, "merge": True}, None, {"merge": True}),
    (("hf", "vllm"), {**HALF, "merge": True}, {"merge": False}, {"merge": False}),
    (("vllm",), {"merge": True}, {**HALF, "reducer": "uniform"}, {"merge": True}),
    # It merges by itself, and the request says nothing of merging.
    (("hf",), {**HALF, "merge": True}, {"reducer": "bipartite"}, {"stage_options": {}}),
    (("vllm", "sglang"), HALF, None, {"stage_options": {}}),
    (("hf",), {**HALF, **SELECTOR}, {"ratio": 0.6}, {"ratio": 0.6, "weights": "/etc/passwd"}),
    *((("hf",), {**HALF, "reducer": name}, None, {"ratio": 0.5})
      for name in available_reducers() if name != "auto"),
]  # fmt: skip


@pytest.mark.parametrize(("engines", "server", "request_options", "wanted"), TAKEN)
def test_requests_change_the_default(
    engines: Any, server: Any, request_options: Any, wanted: Any
) -> None:
    for engine in engines:
        spec = resolved(server, request_options, engine)
        known = {**spec.describe().get("options", {}), "name": spec.describe().get("reducer")}
        if "tower" in wanted:
            known["tower"] = spec.built_tower_reducer.name
        for name, value in wanted.items():
            assert (known[name] if name in known else getattr(spec, name)) == value, engine


CLOSED = {**HALF, "max_ratio": 0.8}
REFUSED: list[tuple[tuple[str, ...], Any, Any]] = [
    *((ENGINES, CLOSED, {"ratio": ratio}) for ratio in (0.81, -1, None, "nan", "0.5", 10**400)),
    *((("hf", "vllm"), CLOSED, {"ratio": ratio})
      for ratio in ({}, {"video": 0.9}, {"film": 0.5}, {"image": None}, {"image": {"image": 1}},
                    {"image": "0.5"})),
    (("sglang",), CLOSED, {"ratio": {"video": 0.5}}), (("hf",), TOWER, {"ratio": {"video": 0.5}}),
    *((ENGINES, HALF, {"budget": budget})
      for budget in (0, 1.5, "512", None, True, [512], 10**7, {"image": 4}, {"prompt": 512})),
    (ENGINES, HALF, {"budget": 512, "ratio": 0.5}), (ENGINES, {**BUDGET, **HALF}, None),
    (ENGINES, {**BUDGET, "max_ratio": 0.8}, {"budget": 512}),  # its ratio depends on the media
    (ENGINES, {**HALF, "per_request": False}, {"ratio": 0.1}),
    (ENGINES, {**HALF, "per_request": "no"}, None), (ENGINES, {**HALF, "max_ratio": 0.2}, None),
    # What a path names, and whether it exists, is not for clients.
    (("hf",), {**HALF, **SELECTOR}, SELECTOR),
    (("hf",), {**HALF, **SELECTOR}, {"options": {"weights": None}}),
    (("hf",), HALF, {"reducer": "bipartite+prune", "options": {"prune.weights": "/etc/passwd"}}),
    (("hf",), {**HALF, **SELECTOR}, {"reducer": "selector", "weights": "/etc/passwd"}),
    *((ENGINES, HALF, wrong)
      for wrong in ({"plan": "/etc/passwd"}, {"options": {"plan": [{"layer": 0, "fraction": 1}]}},
                    {"options": {"options": {"seed": 1}}}, {"options": {"reducer": "uniform"}})),
    (ENGINES, {**BUDGET, "max_ratio": 0.8}, {"options": {"budget": 512}}),
    *((ENGINES, HALF, {"reducer": name, "options": {option: value}})
      for name, option, value in (
          ("random", "seed", "x"), ("random", "seed", 1e30), ("random", "sead", 1),
          ("bipartite", "weighted", "x"), ("pool", "stride", 1e300),
          ("pool", "group", float("nan")),
      )),
    *((ENGINES, HALF, wrong)
      for wrong in ({"options": [1]}, {"rate": 0.5}, {"max_ratio": 0.5}, "{", "3", [1])),
    *((ENGINES, HALF, {field: name}) for field in ("reducer", "tower_reducer")
      for name in ("nothing", "orcle", "orcle+prune", "+", 3, [3], {"a": 1})),
    *((("vllm", "sglang"), {**HALF, "reducer": name}, None)
      for name in available_reducers() if name not in (*SERVABLE, *DECIDING, "auto")),
    *((("sglang",), {**HALF, "reducer": name}, None) for name in DECIDING),
    *((("vllm",), HALF, {"reducer": name, "options": {"then": "condiv"}}) for name in DECIDING),
    *((("vllm", "sglang"), {}, {**HALF, "reducer": name}) for name in ("fastv", "aim")),
    (("vllm",), {}, {"merge": True}),
    (("hf",), {**HALF, "merge": "some"}, None), (("sglang",), TOWER, None),
    (("sglang",), HALF, {"tower_reducer": "random"}),
    *((("hf", "vllm"), TOWER, wrong)
      for wrong in ({"tower_ratio": 0.9}, {"tower_reducer": "fastv"})),
    (("vllm",), TOWER, {"tower_reducer": "adsc"}),  # it cannot act in the tower of an engine
    (("vllm",), TOWER, {"reducer": "pool"}),  # which needs the whole grid
]  # fmt: skip


@pytest.mark.parametrize(("engines", "server", "request_options"), REFUSED)
def test_what_an_engine_cannot_run_is_refused(
    engines: Any, server: Any, request_options: Any
) -> None:
    for engine in engines:
        with pytest.raises((OptionError, RatioError, PlanError)):
            resolved(server, request_options, engine)


def test_low_detail_beside_a_budget() -> None:
    detail = ServerOptions.parse({"budget": 64, "low_detail_ratio": 0.75}, "hf")
    assert detail.low_detail([("image_url", "low")]).ratio == 0.75
    with pytest.raises(OptionError):
        detail.low_detail([("image_url", "low"), ("video_url", None)])


def test_options_that_make_a_reducer_servable_are_named() -> None:
    with pytest.raises(OptionError, match="scope with saliency=none,"):
        ServerOptions.parse({"reducer": "condiv", "ratio": 0.5})
    assert not serving_safe(make_reducer("scope"))
    spec = resolved({"reducer": "scope", "ratio": 0.5, "options": {"saliency": "none"}}, None)
    assert spec.built_reducer == make_reducer("scope", saliency="none")


def test_options_are_plain_json_and_equal_ones_are_one_key() -> None:
    for name in SERVABLE:
        described = Method(make_reducer(name), 0.5).describe()
        assert json.loads(json.dumps(described)) == described
    assert hash(resolved(SEEDED, HALF)) == hash(resolved(SEEDED, None))


def test_the_page_has_the_table_of_engines() -> None:
    rows = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in table()]
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert "\n".join([rows[0], "|" + "---|" * len(table()[0]), *rows[1:]]) in page
