"""The method spec: checked once, planned once, and one handle per setting in an evaluation."""

from __future__ import annotations

from typing import Any

import pytest

import tokencomp
from tokencomp import method, patching
from tokencomp.cli._methods import checked
from tokencomp.errors import OptionError, UnknownNameError, WeightsError
from tokencomp.evaluation import Setting, grid, sweep
from tokencomp.evaluation.patches import PatchedModels
from tokencomp.handle import handle_of
from tokencomp.method import DEFAULT_REDUCER, DEFAULT_SERVED_REDUCER, MethodSpec, resolve_auto
from tokencomp.plan import counts as keep_counts
from tokencomp.reducers import base
from tokencomp.reducers.uniform import Uniform
from tokencomp.storage import check_identity


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often ratios are checked and reducers are built."""
    counts = {"check_ratio": 0, "built": 0}
    check_ratio, post_init = keep_counts.check_ratio, base.Reducer.__post_init__

    def checking(ratio: float, name: str = "ratio") -> float:
        counts["check_ratio"] += name == "ratio"
        return check_ratio(ratio, name)

    def building(self: Any) -> None:
        counts["built"] += 1
        post_init(self)

    for module in (keep_counts, base, method, patching):
        monkeypatch.setattr(module, "check_ratio", checking, raising=False)
    monkeypatch.setattr(base.Reducer, "__post_init__", building)
    return counts


def test_a_setting_is_validated_and_planned_once(
    loaded: Any, examples: Any, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the first batch; each of two batches reinstalls one handle."""
    from tokencomp.evaluation import batches

    before: list[dict[str, int]] = []
    generate = batches.generate
    monkeypatch.setattr(
        batches, "generate", lambda *args: before.append(dict(calls)) or generate(*args)
    )
    settings = checked(grid(["divprune"], [0.75])[1:], loaded[0])
    runs = sweep(*loaded, examples[:2], settings, batch_size=1, max_new_tokens=2, progress=False)
    assert len(before) == 2 and len(runs[settings[0]].answered) == 2
    for counts in before:
        assert counts["check_ratio"] <= 4 and counts["built"] == 1


def test_each_setting_has_one_handle(loaded: Any) -> None:
    model = loaded[0]
    clean = hooks(model)
    first, second = Setting("uniform", 0.5), Setting("divprune", 0.9)
    with tokencomp.patch(model, 0.25, reducer="bipartite") as outer:
        inside = hooks(model)
        with PatchedModels({"": model}) as patches:
            assert hooks(model) == clean
            seen: dict[Setting, list[Any]] = {first: [], second: []}
            for setting in (first, second, first):
                with patches.applied(setting, ["a"]) as handle:
                    assert hooks(model) > clean
                    seen[setting].append(handle)
                assert hooks(model) == clean
            with patches.applied(Setting(), ["a"]) as handle:
                assert handle is None
        assert seen[first][0] is seen[first][1] is not seen[second][0]
        assert hooks(model) == inside and outer.set(ratio=0.5)
    assert hooks(model) == clean


def test_check_says_what_patch_would_and_leaves_the_model_alone(loaded: Any) -> None:
    model, clean = loaded[0], hooks(loaded[0])
    patching.check(model, MethodSpec("uniform", 0.5))
    with pytest.raises(WeightsError, match="tokencomp train ccam"):
        patching.check(model, MethodSpec("ccam", 0.5))
    late = tokencomp.plan_from_json([{"layer": 99, "fraction": 0.5, "reducer": "bipartite"}])
    with pytest.raises(tokencomp.TokenCompError, match="decoder has 6 layers"):
        patching.check(model, MethodSpec(plan=late))
    assert hooks(model) == clean and handle_of(model) is None


def test_auto_depends_on_the_engine_alone() -> None:
    assert resolve_auto("auto") == DEFAULT_REDUCER != DEFAULT_SERVED_REDUCER
    assert resolve_auto("auto", "server") == DEFAULT_SERVED_REDUCER
    assert resolve_auto("bipartite", "server") == "bipartite"
    reducer = Uniform()
    assert resolve_auto(reducer, "server") is reducer
    assert resolve_auto("auto", scored=False) == "kcenter"
    assert "Auto(image=KCenter(" in repr(MethodSpec("auto", 0.5).stages(28, 1))


def test_specs_are_equal_by_their_fields() -> None:
    options = {"weighted": False}
    assert MethodSpec("bipartite", 0.5, options) == MethodSpec("bipartite", 0.5, dict(options))
    assert hash(MethodSpec("bipartite", 0.5, options)) == hash(
        MethodSpec("bipartite", 0.5, dict(options))
    )
    assert Setting("bipartite", 0.5, name="a") != Setting("bipartite", 0.5, name="b")
    assert MethodSpec("bipartite", 0.0).describe() == MethodSpec().describe() == {"ratio": 0.0}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("bipartitee", 0.5), UnknownNameError),
        (("uniform", 0.5, {"seed": 1}), OptionError),
        (("bipartite", 1.0), tokencomp.TokenCompError),
        (("bipartite", 0.5, {}, tokencomp.Plan()), OptionError),
        (("uniform", 0.5, {}, None, "keep"), OptionError),
    ],
)
def test_a_spec_is_validated_when_it_is_made(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        MethodSpec(*arguments)


def test_identities_are_compared_as_json_writes_them() -> None:
    check_identity("x", {"a": [1, 2]}, {"a": (1, 2)})
    with pytest.raises(OptionError, match=r"x holds a run that differs in b: None there, 1 now"):
        check_identity("x", {"a": 1}, {"a": 1, "b": 1})


def test_the_earlier_name_of_an_evaluated_run_stays() -> None:
    from tokencomp.evaluation import EvalRun, Run

    assert Run is EvalRun
