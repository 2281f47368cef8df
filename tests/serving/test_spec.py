"""What a server compresses with: its own options, and those of requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.serving.cases import SERVABLE

from tokencomp.errors import OptionError, PlanError, RatioError
from tokencomp.method import MethodSpec
from tokencomp.reducers.registry import available_reducers, make_reducer, options_of
from tokencomp.serving.servable import serving_safe
from tokencomp.serving.spec import ServerOptions


def test_request_options_override_the_server_default() -> None:
    text = '{"reducer": "random", "ratio": 0.5, "options": {"seed": 7}, "max_ratio": 0.8}'
    server = ServerOptions.parse(text)
    assert server.default.describe() == {
        "reducer": "random", "ratio": 0.5, "options": {"seed": 7, "at": 0.0}
    }  # fmt: skip
    assert server.resolve(None) is server.default
    assert server.resolve({"ratio": 0.25}).describe()["options"]["seed"] == 7
    assert server.resolve({"options": {"seed": 8}}).describe()["options"]["seed"] == 8
    assert server.resolve({"reducer": "uniform"}).describe()["reducer"] == "uniform"
    assert server.resolve({"ratio": 0}).describe() == MethodSpec().describe()
    assert hash(server.resolve({"ratio": 0.5})) == hash(server.default)
    for wrong in ({"ratio": 0.81}, {"ratio": -1}, {"ratio": None}, {"ratio": "nan"}):
        with pytest.raises(RatioError):
            server.resolve(wrong)


def test_ratios_by_modality_of_media() -> None:
    server = ServerOptions.parse({"ratio": 0.5, "max_ratio": 0.8}, "hf")
    spec = server.resolve({"ratio": {"image": "0.5", "video": 0.75}}, "hf")
    assert spec.ratios == {"image": 0.5, "video": 0.75} and spec.shown_ratio
    for wrong in ({}, {"video": 0.9}, {"film": 0.5}, {"image": None}, {"image": {"image": 0.5}}):
        with pytest.raises(RatioError):
            server.resolve({"ratio": wrong}, "hf")
    assert server.resolve({"ratio": {"video": 0.5}}).ratios == {"video": 0.5}  # on vLLM
    with pytest.raises(OptionError, match="SGLang"):
        server.resolve({"ratio": {"video": 0.5}}, "sglang")
    tower = ServerOptions.parse({"ratio": 0.5, "tower_ratio": 0.5}, "hf")
    with pytest.raises(OptionError, match="tower_ratio"):
        tower.resolve({"ratio": {"video": 0.5}}, "hf")
    assert tower.resolve({"ratio": {"video": 0.5}, "tower_ratio": 0}, "hf").ratios


def test_budgets_in_tokens() -> None:
    """As the default and of a request, on every engine; not beside a ratio or its bound."""
    for engine in ("hf", "vllm", "sglang"):
        server = ServerOptions.parse({"ratio": 0.5}, engine)
        spec = server.resolve({"budget": 512, "reducer": "uniform"}, engine)
        own = options_of(make_reducer("uniform"))
        assert spec.describe() == {"reducer": "uniform", "budget": 512, "options": own}
        default = ServerOptions.parse({"budget": 64}, engine)
        assert default.default.budget == 64 and default.default.active
        assert default.resolve({"reducer": "uniform"}, engine).budget == 64
        other = default.resolve({"ratio": 0.25}, engine)
        assert (other.budget, other.ratio) == (None, 0.25)
        assert not default.resolve({"ratio": 0}, engine).active
        for wrong in (0, 1.5, "512", None, True, [512], 10**7, {"image": 4}):
            with pytest.raises(RatioError, match="budget"):
                server.resolve({"budget": wrong}, engine)
        with pytest.raises(OptionError, match="Leave one out"):
            server.resolve({"budget": 512, "ratio": 0.5}, engine)
        with pytest.raises(OptionError, match="Leave one out"):
            ServerOptions.parse({"budget": 512, "ratio": 0.5}, engine)
        with pytest.raises(OptionError, match="every image and clip by itself"):
            server.resolve({"budget": {"prompt": 512}}, engine)
        bounded = ServerOptions.parse({"budget": 64, "max_ratio": 0.8}, engine)
        assert bounded.resolve({"reducer": "uniform"}, engine).budget == 64
        with pytest.raises(RatioError, match="depends on the media"):
            bounded.resolve({"budget": 512}, engine)
    detail = ServerOptions.parse({"budget": 64, "low_detail_ratio": 0.75}, "hf")
    assert detail.low_detail([("image_url", "low")]).ratio == 0.75
    with pytest.raises(OptionError, match="Send them apart"):
        detail.low_detail([("image_url", "low"), ("video_url", None)])
    tower = ServerOptions.parse({"ratio": 0.5, "tower_ratio": 0.5}, "hf")
    assert tower.resolve({"budget": 8}, "hf").dropped_cells == 0


def test_only_the_operator_may_set_paths() -> None:
    options = {"reducer": "selector", "ratio": 0.5, "options": {"weights": "somewhere"}}
    server = ServerOptions.parse(options, "hf")
    assert server.resolve({"ratio": 0.6}, "hf").describe()["options"]["weights"] == "somewhere"
    composed = {"reducer": "bipartite+prune", "options": {"prune.weights": "/etc/passwd"}}
    for wrong in (options, {"options": {"weights": None}}, composed):
        with pytest.raises(OptionError, match="operator"):
            server.resolve(wrong, "hf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"options": {"seed": "x"}, "reducer": "random"},
        {"options": {"seed": 1e30}, "reducer": "random"},
        {"options": {"weighted": "x"}, "reducer": "bipartite"},
        {"options": {"stride": 1e300}, "reducer": "pool"},
        {"options": {"group": float("nan")}, "reducer": "pool"},
        {"reducer": "nothing"}, {"reducer": 3}, {"rate": 0.5}, {"options": [1]}, "{", "3", [1],
        {"options": {"sead": 1}, "reducer": "random"}, {"max_ratio": 0.5},
    ],
)  # fmt: skip
def test_bad_request_options(wrong: Any) -> None:
    with pytest.raises(OptionError):
        ServerOptions().resolve(wrong)


def test_the_default_can_be_served() -> None:
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "reducer": "auto"}):
        for engine in ("vllm", "hf"):
            assert ServerOptions.parse(options, engine).default.describe()["reducer"] == "kcenter"
        assert ServerOptions().resolve(options).describe()["reducer"] == "kcenter"
    assert "kcenter" in SERVABLE


def test_fixed_servers_refuse_request_options() -> None:
    server = ServerOptions.parse({"ratio": 0.5, "reducer": "uniform", "per_request": False})
    assert server.resolve(None).ratio == 0.5
    with pytest.raises(OptionError, match="per_request=false"):
        server.resolve({"ratio": 0.1})
    with pytest.raises(OptionError, match="true or false"):
        ServerOptions.parse({"per_request": "no"})


def test_refused_reducers_are_answered_with_those_that_can_run() -> None:
    refused = [name for name in available_reducers() if name not in (*SERVABLE, "auto")]
    assert {"fastv", "aim"} <= set(refused)
    for name in refused:
        with pytest.raises(OptionError) as error:
            ServerOptions.parse({"reducer": name, "ratio": 0.5})
        assert all(good in str(error.value) for good in SERVABLE)
        assert ServerOptions.parse({"reducer": name, "ratio": 0.5}, engine="hf").default.active


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_merging_the_rest_is_for_our_server_alone(engine: str) -> None:
    """Said by name; whether the operator or a request asks for it."""
    asked = {"ratio": 0.5, "merge": True}
    assert ServerOptions.parse({"ratio": 0.5}, engine).default.merge_in_force is False
    assert ServerOptions.parse(asked, "hf").default.merge is True
    assert ServerOptions.parse({"ratio": 0.5}, "hf").resolve(asked, "hf").merge is True
    assert ServerOptions.parse(asked, "hf").resolve({"merge": False}, "hf").merge is False
    own = ServerOptions.parse(asked, "hf").resolve({"reducer": "bipartite"}, "hf")
    assert own.merge_in_force is False  # it merges by itself, and the request names no rest
    for resolve in (ServerOptions.parse, ServerOptions.parse({"ratio": 0.5}, engine).resolve):
        with pytest.raises(OptionError, match=r"merge=true: .* no weights for the rows"):
            resolve(asked, engine)
    with pytest.raises(OptionError, match="merge='some'; allowed"):
        ServerOptions.parse({"ratio": 0.5, "merge": "some"}, "hf")


@pytest.mark.parametrize("name", ["nothing", "orcle", "orcle+prune", "", "+", 3, None, [], {}])
@pytest.mark.parametrize("field", ["reducer", "tower_reducer"])
def test_reducers_that_a_request_may_name_are_listed(field: str, name: Any) -> None:
    options = {field: name, "ratio": 0.5}
    if name is None:  # as if the field were left out
        assert ServerOptions().resolve(options, "hf").active
        return
    with pytest.raises(OptionError) as error:
        ServerOptions().resolve(options, "hf")
    assert all(good in str(error.value) for good in available_reducers())


def test_reducers_that_cannot_act_in_the_tower_of_an_engine_are_refused() -> None:
    """They would fail in the engine, and take all other requests with them."""
    options = {"ratio": 0.75, "tower_ratio": 0.5, "tower_reducer": "adsc"}
    with pytest.raises(OptionError, match="cannot run inside"):
        ServerOptions().resolve(options, "vllm")
    assert ServerOptions().resolve(options, "hf").dropped_cells == 0.5


def test_a_ratio_that_no_float_can_hold_is_refused() -> None:
    with pytest.raises(RatioError, match=r"expected a number in \[0, 1\)"):
        ServerOptions.parse({"ratio": 10**400})


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_default_ratio_above_the_maximum_is_refused(engine: str) -> None:
    with pytest.raises(RatioError, match=r"ratio=0\.5 is above max_ratio=0\.2"):
        ServerOptions.parse({"reducer": "divprune", "ratio": 0.5, "max_ratio": 0.2}, engine)
    high = ServerOptions.parse({"reducer": "divprune", "ratio": 0.99}, engine)
    assert high.resolve({}, engine).ratio == 0.99


def test_options_that_make_a_reducer_servable_are_named() -> None:
    """The error names exactly the choices that do not depend on the text, found by trying all."""

    with pytest.raises(OptionError) as error:
        ServerOptions.parse({"reducer": "condiv", "ratio": 0.5})
    assert not serving_safe(make_reducer("scope"))
    assert "scope with saliency=none," in str(error.value)
    options = {"reducer": "scope", "ratio": 0.5, "options": {"saliency": "none"}}
    assert ServerOptions.parse(options).default.reducer == make_reducer("scope", saliency="none")


def test_options_are_plain_json() -> None:
    for name in SERVABLE:
        described = MethodSpec(make_reducer(name), 0.5).describe()
        assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_the_stage_in_the_vision_tower(engine: str) -> None:
    """A request may change the stage like everything else."""
    server = ServerOptions.parse({"ratio": 0.75, "tower_ratio": 0.6}, engine)
    assert server.default.dropped_cells == 0.6

    def resolve(**options: Any) -> MethodSpec:
        return server.resolve(options, engine)

    assert resolve(ratio=0.5).dropped_cells == 0.5  # never above the ratio
    assert resolve(tower_ratio=0.0).dropped_cells == 0
    assert resolve(tower_ratio="auto").dropped_cells == pytest.approx(0.6)
    assert resolve(tower_reducer="random").built_tower_reducer.name == "random"
    with pytest.raises(PlanError, match=r"tower_ratio=0\.9"):
        resolve(tower_ratio=0.9)
    with pytest.raises(PlanError, match="whole grid"):
        resolve(reducer="pool").stages(1, 1)
    with pytest.raises(PlanError, match="only plans the steps"):
        resolve(tower_reducer="fastv")


def test_the_stage_in_the_vision_tower_is_refused_where_there_is_none() -> None:
    with pytest.raises(OptionError, match="SGLang plugin has no stage"):
        ServerOptions.parse({"ratio": 0.75, "tower_ratio": 0.6}, "sglang")
    with pytest.raises(OptionError, match="SGLang plugin has no stage"):
        ServerOptions().resolve({"ratio": 0.75, "tower_reducer": "random"}, "sglang")
