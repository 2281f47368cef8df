"""The method spec: checked once, planned once, and one handle per setting in an evaluation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.families import FAMILIES

import tokencomp
from tokencomp import patching
from tokencomp.errors import OptionError, UnknownNameError, WeightsError
from tokencomp.evaluation import Setting
from tokencomp.evaluation.patches import patched
from tokencomp.handle import handle_of
from tokencomp.method import Method
from tokencomp.reducers.registry import make_reducer
from tokencomp.serving.spec import ServerOptions
from tokencomp.storage import check_identity


def test_check_says_what_patch_would_and_leaves_the_model_alone(loaded: Any) -> None:
    model = loaded[0]
    patching.check(model, Method("uniform", 0.5))
    with pytest.raises(WeightsError, match="tokencomp train ccam"):
        patching.check(model, Method("ccam", 0.5))
    late = tokencomp.plan_from_json([{"layer": 99, "fraction": 0.5, "reducer": "bipartite"}])
    with pytest.raises(tokencomp.TokenCompError, match="decoder has 6 layers"):
        patching.check(model, Method(plan=late))
    assert handle_of(model) is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("bipartitee", 0.5), UnknownNameError),
        (("uniform", 0.5, {"seed": 1}), OptionError),
        (("bipartite", 1.0), tokencomp.TokenCompError),
        (("bipartite", 0.5, {}, tokencomp.Plan()), OptionError),
        (("uniform", 0.5, {"merge": "keep"}), OptionError),
    ],
)
def test_a_spec_is_validated_when_it_is_made(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Method(*arguments)


def test_methods_without_effect_have_one_description() -> None:
    """What a server has cached of the full model is used whatever reducer a request names."""
    for reducer in ("auto", "fastv", make_reducer("uniform")):
        assert Method(reducer, 0.0).describe() == Method("kcenter", 0.0).describe()
    assert Method("fastv", 0.5).describe() != Method("kcenter", 0.5).describe()


def test_identities_are_compared_as_json_writes_them() -> None:
    check_identity("x", {"a": [1, 2]}, {"a": (1, 2)})
    with pytest.raises(OptionError, match=r"x holds a run that differs in b: None there, 1 now"):
        check_identity("x", {"a": 1}, {"a": 1, "b": 1})


def test_a_plan_without_a_ratio_runs(loaded: Any) -> None:
    """It was the full model, under its name."""
    plan = [{"layer": 2, "fraction": 0.5, "reducer": "uniform"}]
    setting = Setting("plan", options={"plan": plan})
    assert setting.active and setting != Setting()
    with patched(loaded[0], setting) as handle:
        assert handle is not None and [stage.layer for stage in handle.plan.stages] == [2]


SAME: list[dict[str, Any]] = [
    {"reducer": "kcenter", "ratio": 0.75, "merge": True},
    {"reducer": "scope", "options": {"saliency": "none"}, "budget": 64},
    {"reducer": "uniform", "ratio": {"image": 0.5, "video": 0.75}},
    {"reducer": "uniform", "ratio": 0.75, "tower_ratio": 0.5, "tower_reducer": "random"},
]


@pytest.mark.parametrize("given", SAME)
def test_one_setting_is_one_method_wherever_it_comes_from(given: dict[str, Any]) -> None:
    """By `Method`, `override`, a server, a request, the JSON of either, and an evaluation."""
    method = Method(**given)
    default = ServerOptions.parse({"ratio": 0.25, "reducer": "divprune"}, "hf")
    stage = {name: value for name, value in given.items() if name not in ("reducer", "ratio")}
    options = {**stage.pop("options", {}), **stage}
    by = {
        "override": Method().override(given),
        "server": ServerOptions.parse(json.dumps(given), "hf").default,
        "request": default.resolve(given, "hf"),
        "request in JSON": default.resolve(json.dumps(given), "hf"),
        "evaluation": Setting(given["reducer"], given.get("ratio", 0.0), options),
    }
    assert {name: same.describe() for name, same in by.items()} == dict.fromkeys(
        by, method.describe()
    )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 1.5}, r"ratio=1\.5"),
    ({"ratio": "0.5"}, "ratio='0.5'"),
    ({"ratio": {"film": 0.5}}, "'film' is no modality"),
    ({"budget": 0}, "budget=0"),
    ({"ratio": 0.5, "budget": 64}, "a budget says in tokens"),
    ({"ratio": 0.5, "reducer": "kcentr"}, "unknown reducer 'kcentr'"),
    ({"ratio": 0.5, "reducer": "random", "options": {"sead": 1}}, "has no option 'sead'"),
    ({"ratio": 0.5, "reducer": "random", "options": {"seed": "x"}}, "seed='x'"),
    ({"ratio": 0.5, "merge": "keep"}, "merge='keep'; allowed: True, False, 'auto'"),
    ({"ratio": 0.5, "reducer": "pool", "merge": True}, "'pool' merges tokens by itself"),
    ({"ratio": 0.5, "tower_ratio": 0.75}, r"tower_ratio=0\.75 leaves 0\.25"),
    ({"ratio": 0.5, "tower_ratio": 0.25, "tower_reducer": "x"}, "unknown reducer 'x'"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_wrong_setting_has_one_message_everywhere(given: dict[str, Any], message: str) -> None:
    server, patch = ServerOptions.parse({"ratio": 0.25}, "hf"), dict(given)
    patch |= patch.pop("options", {})
    handle = tokencomp.patch(FAMILIES["qwen2_vl"].build(), 0.25)
    for refuses in (
        lambda: tokencomp.patch(FAMILIES["qwen2_vl"].build(), **patch),
        lambda: handle.set(**patch),
        lambda: ServerOptions.parse(given, "hf"),
        lambda: server.resolve(given, "hf"),
        lambda: server.resolve(json.dumps(given), "vllm"),
        lambda: Setting(**{"reducer": "auto", **given}),
    ):
        with pytest.raises(tokencomp.TokenCompError, match=message):
            refuses()
