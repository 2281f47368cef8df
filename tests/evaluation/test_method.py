"""The method spec: checked once, planned once, and one handle per setting in an evaluation."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.console import run

import tokencomp
from tokencomp import patching
from tokencomp.errors import OptionError, UnknownNameError, WeightsError
from tokencomp.evaluation import Setting
from tokencomp.evaluation.patches import patched
from tokencomp.handle import handle_of
from tokencomp.method import Method
from tokencomp.reducers.registry import make_reducer
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm.entry import configured_options
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


WRONG: dict[str, dict[str, Any]] = {
    "above 1": {"ratio": 1.5}, "a text": {"ratio": "half"}, "modality": {"ratio": {"film": 0.5}},
    "budget": {"budget": 0}, "two amounts": {"ratio": 0.5, "budget": 64},
    "reducer": {"ratio": 0.5, "reducer": "kcentr"},
    "option": {"ratio": 0.5, "reducer": "random", "options": {"sead": 1}},
    "of another": {"ratio": 0.5, "reducer": "uniform", "options": {"seed": 1}},
    "type": {"ratio": 0.5, "reducer": "random", "options": {"seed": "x"}},
    "range": {"ratio": 0.5, "reducer": "condiv", "options": {"power": -1}},
    "word": {"ratio": 0.5, "merge": "keep"},
    "merges": {"ratio": 0.5, "reducer": "pool", "merge": True},
    "tower": {"ratio": 0.5, "tower_ratio": 0.75}, "tower text": {"tower_ratio": "most"},
    "tower reducer": {"ratio": 0.5, "tower_ratio": 0.25, "tower_reducer": "x"},
}  # fmt: skip


def words(given: dict[str, Any]) -> list[str]:
    """A setting on the command line."""
    parts = {name: value for name, value in given.items() if name != "options"}
    if options := ",".join(f"{name}={value}" for name, value in given.get("options", {}).items()):
        parts["reducer"] += f"({options})"
    texts = {True: "on"}
    for name, value in parts.items():
        if isinstance(value, dict):
            parts[name] = ",".join(f"{modality}={ratio}" for modality, ratio in value.items())
    return [
        word for name, value in parts.items()
        for word in (f"--{name.replace('_', '-')}", texts.get(value, str(value)))
    ]  # fmt: skip


def refusal(call: Callable[[], Any]) -> str:
    """The message of the error that a call must raise."""
    with pytest.raises(tokencomp.TokenCompError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_has_one_message_everywhere(
    name: str, loaded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python, JSON, requests, `hf_overrides`, evaluations, and on the command line."""
    given = WRONG[name]
    message, server = refusal(lambda: Method(**given)), ServerOptions.parse({"ratio": 0.25}, "hf")
    patch = {**given, **given.get("options", {})}
    patch.pop("options", None)
    config = SimpleNamespace(hf_config=SimpleNamespace(tokencomp=given))  # as vLLM overrides it
    calls: list[Callable[[], Any]] = [
        lambda: tokencomp.patch(loaded[0], **patch),
        lambda: ServerOptions.parse(json.dumps(given), "hf"),
        lambda: ServerOptions.parse(configured_options(config), "vllm"),
        lambda: server.resolve(given, "hf"),
        lambda: server.resolve(json.dumps(given), "vllm"),
        lambda: Setting(**{"reducer": "auto", **given}),
    ]
    with tokencomp.patch(loaded[0], 0.25) as handle:
        assert message in refusal(lambda: handle.set(**patch))
    for call in calls:
        assert message in refusal(call)
    for command in ("serve", "inspect"):
        assert run(command, *words(given)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"nonsense": 1}, {"options": {"nonsense": 1}}])
def test_an_unknown_option_has_one_message_everywhere(given: dict[str, Any], loaded: Any) -> None:
    """At any place in JSON, a request or `hf_overrides`, as in Python and in evaluations."""
    message = refusal(lambda: tokencomp.patch(loaded[0], nonsense=1))
    server, config = ServerOptions(), SimpleNamespace(hf_config=SimpleNamespace(tokencomp=given))
    calls: list[Callable[[], Any]] = [
        lambda: ServerOptions.parse(json.dumps(given), "hf"),
        lambda: ServerOptions.parse(configured_options(config), "vllm"),
        *(functools.partial(server.resolve, given, name) for name in ("hf", "vllm", "sglang")),
        lambda: Setting("auto", 0.5, given.get("options", given)),
    ]
    with tokencomp.patch(loaded[0], 0.25) as handle:
        assert refusal(lambda: handle.set(nonsense=1)) == message
    assert [refusal(call) for call in calls] == [message] * len(calls)


@pytest.mark.parametrize(
    "stage", [{"fraction": 0.5, "reducer": "uniform"}, {"layer": 0, "fraction": 2}, {"layr": 0}]
)
def test_a_wrong_plan_has_one_message_everywhere(
    stage: dict[str, Any], loaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(lambda: tokencomp.plan_from_json([stage]))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps([stage]))
    for call in (
        lambda: tokencomp.patch(loaded[0], plan=[stage]),
        lambda: Setting("plan", options={"plan": [stage]}),
    ):
        assert message in refusal(call)
    assert run("inspect", "--plan", file) == 2
    assert message in capsys.readouterr().err
