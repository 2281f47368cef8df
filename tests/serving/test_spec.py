"""Server options, request options, and the plan of a media item."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import families

import tokencomp
from tokencomp.errors import OptionError, PlanError, RatioError, UnsupportedModelError
from tokencomp.method import MethodSpec
from tokencomp.reducers.registry import available_reducers, make_reducer
from tokencomp.serving.hf.media import Limits
from tokencomp.serving.item_plan import ItemPlan, Layout
from tokencomp.serving.launch import Bind, vllm_command
from tokencomp.serving.spec import ServerOptions, servable
from tokencomp.tokens import ModelFacts, VisualSpan, VisualTokens

SERVABLE = [name for name, option in servable().items() if not option]
LAYOUTS = [
    Layout((1, 5, 7)),
    Layout((3, 4, 4)),
    Layout((1, 6, 5), "rows"),
    Layout((4, 3, 3), "end"),
    Layout((1, 1, 1)),
]


def special_by_loops(layout: Layout) -> list[bool]:
    t, h, w = layout.grid
    if layout.special == "rows":
        return [flag for _ in range(h) for flag in [*[False] * w, True]]
    return [False] * (t * h * w) + [True] * (layout.special == "end")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_special_tokens(layout: Layout) -> None:
    mask = layout.span("image").special_mask().tolist()
    assert mask == special_by_loops(layout)
    assert layout.length == len(mask) and layout.num_special == sum(mask)


@pytest.mark.parametrize("name", SERVABLE)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.95])
def test_both_backends_count_and_reduce_alike(name: str, ratio: float) -> None:
    """The count is the one the Hugging Face path plans; rows are its reducer's, span by span."""
    reducer = make_reducer(name).bind(ModelFacts(mrope=False))
    stages = reducer.plan(ratio, 4).stages
    assert [s.layer for s in stages] == [0]
    plan = ItemPlan.make("video", LAYOUTS, MethodSpec(reducer, ratio))
    x = torch.randn(plan.full, 16, generator=torch.Generator().manual_seed(1))
    rows, index = plan.reduce(x)
    start = at = 0
    for layout, keep in zip(LAYOUTS, plan.keep, strict=True):
        special = torch.tensor(special_by_loops(layout))
        marks = tuple(special.nonzero()[:, 0].tolist())
        span = VisualSpan(0, layout.length, layout.grid, "video", marks)
        assert reducer.plan(ratio, 4).counts(span, 4) == [keep]
        part = x[start : start + layout.length]
        if keep < layout.length:
            done = reducer.reduce(VisualTokens(part, layout.grid, special, kind="video"), keep)
            want = part[done.keep] if done.merged is None else done.merged
            assert torch.equal(rows[at : at + keep], want)
            assert torch.equal(index[at : at + keep], done.keep + start)
        else:
            assert torch.equal(rows[at : at + keep], part)
        start, at = start + layout.length, at + keep
    assert at == plan.kept == len(rows) == len(index)


def test_layouts_are_the_spans_of_the_adapters() -> None:
    """An image and a video of LLaVA-OneVision have the spans of the patched model's adapter."""
    family = families.FAMILIES["llava_onevision"]
    model = family.build()
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model(**family.batch([[family.image(1), [5], family.video(4)]]))
        spans = handle.stats.spans[0]
    for span, layout in zip(
        spans,
        [Layout((1, 4, 4)), Layout((1, 4, 8), "rows"), Layout((4, 2, 2), "end")],
        strict=True,
    ):
        assert (span.grid, span.length) == (layout.grid, layout.length)
        assert span.special_mask().tolist() == special_by_loops(layout)


def test_plans_travel_unchanged() -> None:
    plan = ItemPlan.make("image", LAYOUTS, MethodSpec(make_reducer("random", seed=3), 0.4))
    data = plan.to_tensor()
    assert data.dtype == torch.uint8 and ItemPlan.from_tensor(data) == plan
    with pytest.raises(RuntimeError, match="planned"):
        plan.reduce(torch.zeros(plan.full + 1, 4))


def test_request_options_override_the_server_default() -> None:
    text = '{"reducer": "random", "ratio": 0.5, "options": {"seed": 7}, "max_ratio": 0.8}'
    server = ServerOptions.parse(text)
    assert server.default.describe() == {
        "reducer": "random", "ratio": 0.5, "options": {"seed": 7}
    }  # fmt: skip
    assert server.resolve(None) is server.default
    assert server.resolve({"ratio": 0.25}).describe()["options"] == {"seed": 7}
    assert server.resolve({"options": {"seed": 8}}).describe()["options"] == {"seed": 8}
    assert server.resolve({"reducer": "uniform"}).describe()["reducer"] == "uniform"
    assert server.resolve({"ratio": 0}).describe() == MethodSpec().describe()
    assert hash(server.resolve({"ratio": 0.5})) == hash(server.default)
    for wrong in ({"ratio": 0.81}, {"ratio": -1}, {"ratio": None}, {"ratio": "nan"}):
        with pytest.raises(RatioError):
            server.resolve(wrong)


def test_only_the_operator_may_set_paths() -> None:
    options = {"reducer": "selector", "ratio": 0.5, "options": {"weights": "somewhere"}}
    server = ServerOptions.parse(options, "hf")
    assert server.resolve({"ratio": 0.6}, "hf").describe()["options"]["weights"] == "somewhere"
    composed = {"reducer": "merge+prune", "options": {"prune.weights": "/etc/passwd"}}
    for wrong in (options, {"options": {"weights": None}}, composed):
        with pytest.raises(OptionError, match="operator"):
            server.resolve(wrong, "hf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"options": {"seed": "x"}, "reducer": "random"},
        {"options": {"seed": 1e30}, "reducer": "random"},
        {"options": {"weighted": "x"}, "reducer": "merge"},
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
            assert ServerOptions.parse(options, engine).default.describe()["reducer"] == "divprune"
        assert ServerOptions().resolve(options).describe()["reducer"] == "divprune"
    assert "divprune" in SERVABLE


def test_fixed_servers_refuse_request_options() -> None:
    server = ServerOptions.parse({"ratio": 0.5, "reducer": "uniform", "per_request": False})
    assert server.resolve(None).ratio == 0.5
    with pytest.raises(OptionError, match="per_request=false"):
        server.resolve({"ratio": 0.1})
    with pytest.raises(OptionError, match="true or false"):
        ServerOptions.parse({"per_request": "no"})


def test_refused_reducers_are_answered_with_those_that_can_run() -> None:
    refused = [name for name in available_reducers() if name not in (*SERVABLE, "oracle")]
    assert {"fastv", "aim"} <= set(refused)
    for name in refused:
        with pytest.raises(OptionError) as error:
            ServerOptions.parse({"reducer": name, "ratio": 0.5})
        assert all(good in str(error.value) for good in SERVABLE)
        assert ServerOptions.parse({"reducer": name, "ratio": 0.5}, engine="hf").default.active


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_oracle_cannot_be_served(engine: str) -> None:
    with pytest.raises(OptionError, match="'oracle' needs the answer"):
        ServerOptions.parse({"reducer": "oracle", "ratio": 0.5}, engine)
    with pytest.raises(OptionError, match="'oracle' needs the answer"):
        ServerOptions.parse({"reducer": " oracle +prune", "ratio": 0.5}, engine)


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
    from tokencomp.reducers.cdpruner import RELEVANCE
    from tokencomp.reducers.condiv import SIGNALS

    with pytest.raises(OptionError) as error:
        ServerOptions.parse({"reducer": "condiv", "ratio": 0.5})
    for name, option, choices in (
        ("condiv", "signal", SIGNALS),
        ("cdpruner", "relevance", RELEVANCE),
    ):
        able = []
        for value in choices:
            options = {"reducer": name, "ratio": 0.5, "options": {option: value}}
            with contextlib.suppress(OptionError):
                able.append(ServerOptions.parse(options).default.reducer.options()[option])
        assert "none" in able and not make_reducer(name).serving_safe
        assert f"{name} with {option}={' or '.join(able)}," in str(error.value)


def test_vllm_starts_with_closed_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of `tokencomp serve --engine vllm`."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    config = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    limits, bind = Limits(allowed_path=tmp_path), Bind(api_key="secret")
    command, env = vllm_command(str(tmp_path), {"ratio": 0.5}, bind, limits, ["--port", "1"])
    arguments = dict(zip(command, [*command[1:], ""], strict=True))
    assert arguments["--allowed-media-domains"] == "invalid." and arguments["--host"] == "127.0.0.1"
    assert arguments["--allowed-local-media-path"] == str(tmp_path)
    assert "secret" not in command and env["VLLM_API_KEY"] == "secret"
    assert arguments["--middleware"].endswith("OwnOptionsOnly") and command[-2:] == ["--port", "1"]
    assert json.loads(env["TOKENCOMP_SERVING"])["only_own"] is True
    fixed = {"ratio": 0.5, "per_request": False}
    command, _ = vllm_command(str(tmp_path), fixed, Bind(), Limits(), [])
    assert "--trust-request-mm-kwargs" not in command
    assert "--allowed-local-media-path" not in command
    with pytest.raises(OptionError, match="divprune"):
        vllm_command(str(tmp_path), {"reducer": "fastv", "ratio": 0.5}, Bind(), Limits(), [])
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"LlavaFor.*--engine hf"):
        vllm_command(str(tmp_path), {"ratio": 0.5}, Bind(), Limits(), [])


def test_options_are_plain_json() -> None:
    for name in SERVABLE:
        described = MethodSpec(make_reducer(name), 0.5).describe()
        assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(("extent", "position"), [(0, "first"), (40, "mean")])
def test_pooled_tokens_have_the_positions_of_the_patched_model(extent: int, position: str) -> None:
    """Between line breaks, the place of a pooled token decides the order of the rows."""
    layout = Layout((1, 6, 5), "rows")
    plan = ItemPlan.make("image", [layout], MethodSpec(make_reducer("pool"), 0.5), extent)
    x = torch.randn(layout.length, 8)
    mask = layout.span("image").special_mask()
    tokens = VisualTokens(x, layout.grid, mask, kind="image")
    expected = make_reducer("pool", position=position).reduce(tokens, plan.keep[0])
    rows, kept = plan.reduce(x)
    other = make_reducer("pool", position="mean" if extent == 0 else "first")
    assert not torch.equal(other.reduce(tokens, plan.keep[0]).merged, rows)
    assert torch.equal(kept, expected.keep) and torch.equal(rows, expected.merged)


def test_the_stage_in_the_vision_tower() -> None:
    """Only our own server runs the tower; a request may change the stage like everything else."""
    server = ServerOptions.parse({"ratio": 0.75, "tower_ratio": 0.6}, engine="hf")
    assert server.default.dropped_cells == 0.6
    resolve = server.resolve
    assert resolve({"ratio": 0.5}, engine="hf").dropped_cells == 0.5  # never above the ratio
    assert resolve({"tower_ratio": 0.0}, engine="hf").dropped_cells == 0
    assert resolve({"tower_ratio": "auto"}, engine="hf").dropped_cells == pytest.approx(0.6)
    named = resolve({"tower_reducer": "random"}, engine="hf")
    assert named.built_tower_reducer.name == "random"
    with pytest.raises(PlanError, match=r"tower_ratio=0\.9"):
        resolve({"tower_ratio": 0.9}, engine="hf")
    with pytest.raises(OptionError, match="--engine hf"):
        ServerOptions.parse({"ratio": 0.75, "tower_ratio": 0.6})
