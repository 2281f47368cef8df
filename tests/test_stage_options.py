"""Every option of a stage is carried from where it is given to the stage.

The command line has the same test in `tests/cli/test_methods.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.families import FAMILIES
from support.stage_options import EXAMPLES, choices_of

import tokencomp
from tokencomp.errors import OptionError
from tokencomp.evaluation import Setting
from tokencomp.evaluation.patches import patched
from tokencomp.plan.options import OPTIONS
from tokencomp.serving.spec import ServerOptions

KCENTER: dict[str, Any] = {"ratio": 0.5, "reducer": "kcenter"}


@pytest.fixture(params=EXAMPLES)
def option(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One option with a value that has an effect."""
    return {request.param: EXAMPLES[request.param][1]}


def stages(handle: tokencomp.Handle, name: str) -> list[Any]:
    return [getattr(stage, name) for stage in handle.plan.stages]


def test_no_option_changes_how_many_patches_are_kept(option: dict[str, Any]) -> None:
    for features, _, kept in choices_of(**KCENTER, **option):
        assert len(kept) == round(len(features) / 2)


def test_patch_and_set(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    handle = tokencomp.patch(FAMILIES["qwen2_vl"].build(), **KCENTER, **option)
    assert stages(handle, name) == [value]
    handle.set(ratio=0.25)  # what is not named stays
    assert stages(handle, name) == [value]
    handle.set(**{name: OPTIONS[name].off})
    assert stages(handle, name) != [value]


def test_plans_and_their_json_form(option: dict[str, Any]) -> None:
    written = {"layer": 0, "fraction": 0.5, "reducer": "kcenter", **option}
    (stage,) = json.loads(json.dumps(tokencomp.plan_to_json(tokencomp.plan_from_json([written]))))
    assert option.items() <= stage.items()
    handle = tokencomp.patch(FAMILIES["qwen2_vl"].build(), plan=[written])
    assert stages(handle, next(iter(option))) == [*option.values()]


def test_settings_of_evaluations(option: dict[str, Any]) -> None:
    setting = Setting("kcenter", 0.5, option)
    stored = json.loads(json.dumps(setting.identity))
    assert Setting(*[stored[k] for k in ("reducer", "ratio", "options")]) == setting
    assert setting != Setting("kcenter", 0.5)
    with patched(FAMILIES["qwen2_vl"].build(), setting) as handle:
        assert handle is not None
        assert stages(handle, next(iter(option))) == [*option.values()]


@pytest.mark.parametrize("where", ["server", "request"])
def test_servers(option: dict[str, Any], where: str) -> None:
    given = {"server": {}, "request": {}, where: option}
    server = ServerOptions.parse({**KCENTER, **given["server"]}, "hf")
    assert option.items() <= server.resolve(given["request"], "hf").stage_options.items()
    with pytest.raises(OptionError):  # an engine without the code of stages
        ServerOptions.parse({**KCENTER, **given["server"]}, "sglang").resolve(
            given["request"], "sglang"
        )
