"""The method spec: checked once, planned once, and one handle per setting in an evaluation."""

from __future__ import annotations

from typing import Any

import pytest

import tokencomp
from tokencomp import patching
from tokencomp.errors import OptionError, UnknownNameError, WeightsError
from tokencomp.handle import handle_of
from tokencomp.method import DEFAULT_REDUCER, DEFAULT_SERVED_REDUCER, MethodSpec, resolve_auto
from tokencomp.reducers.uniform import Uniform
from tokencomp.storage import check_identity


def test_check_says_what_patch_would_and_leaves_the_model_alone(loaded: Any) -> None:
    model = loaded[0]
    patching.check(model, MethodSpec("uniform", 0.5))
    with pytest.raises(WeightsError, match="tokencomp train ccam"):
        patching.check(model, MethodSpec("ccam", 0.5))
    late = tokencomp.plan_from_json([{"layer": 99, "fraction": 0.5, "reducer": "bipartite"}])
    with pytest.raises(tokencomp.TokenCompError, match="decoder has 6 layers"):
        patching.check(model, MethodSpec(plan=late))
    assert handle_of(model) is None


def test_auto_depends_on_the_engine_alone() -> None:
    assert resolve_auto("auto") == DEFAULT_REDUCER != DEFAULT_SERVED_REDUCER
    assert resolve_auto("auto", "server") == DEFAULT_SERVED_REDUCER
    assert resolve_auto("bipartite", "server") == "bipartite"
    reducer = Uniform()
    assert resolve_auto(reducer, "server") is reducer
    assert "Auto(image=KCenter(" in repr(MethodSpec("auto", 0.5).stages(28, 1))


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
        MethodSpec(*arguments)


def test_identities_are_compared_as_json_writes_them() -> None:
    check_identity("x", {"a": [1, 2]}, {"a": (1, 2)})
    with pytest.raises(OptionError, match=r"x holds a run that differs in b: None there, 1 now"):
        check_identity("x", {"a": 1}, {"a": 1, "b": 1})
