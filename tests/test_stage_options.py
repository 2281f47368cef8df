"""Every option of a stage is carried from where it is given to the stage.

The command line has the same test in `tests/cli/test_methods.py`.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from support.families import FAMILIES
from support.stage_options import EXAMPLES, choices_of

import tokencomp
from tokencomp.errors import OptionError
from tokencomp.evaluation import Setting
from tokencomp.evaluation.patches import patched
from tokencomp.method import Method
from tokencomp.plan.counts import budget_shares
from tokencomp.plan.options import OPTIONS
from tokencomp.serving.item_plan import ItemPlan, item_span
from tokencomp.serving.item_rows import reduce_item
from tokencomp.serving.offsets import unpack_sizes
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
@pytest.mark.parametrize("engine", ["hf", "vllm", "sglang"])
def test_servers(option: dict[str, Any], where: str, engine: str) -> None:
    """Attention without weights, as in SGLang, refuses rows that represent several tokens."""
    given = {"server": {}, "request": {}, where: option}
    weighs = any(OPTIONS[name].weighs for name in option)
    refused = weighs and (engine == "sglang" or (engine == "vllm" and where == "request"))
    with pytest.raises(OptionError) if refused else contextlib.nullcontext():
        server = ServerOptions.parse({**KCENTER, **given["server"]}, engine)
        assert option.items() <= server.resolve(given["request"], engine).stage_options.items()


def test_engines_choose_what_transformers_chooses(option: dict[str, Any]) -> None:
    """vLLM and SGLang, whose plans travel as bytes."""
    method = Method("kcenter", 0.5, option)
    for features, grid, kept in choices_of(**KCENTER, **option):
        plan = ItemPlan.make([item_span("image", grid)], method)
        assert reduce_item(ItemPlan.from_tensor(plan.to_tensor()), features)[1].tolist() == kept


@pytest.mark.parametrize("special", [(), (2, 7)])
def test_mlx_chooses_what_an_item_plan_chooses(
    option: dict[str, Any], special: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between line breaks; rows and sizes are the same."""
    pytest.importorskip("mlx_vlm")
    import mlx.core as mx

    from tokencomp.mlx.method import MlxMethod
    from tokencomp.mlx.spans import Span

    grid, length = (1, 4, 5), 20 + len(special)
    x = torch.randn(length, 8, generator=torch.Generator().manual_seed(0))
    breaks = np.isin(np.arange(length), special)
    span = Span("image", grid, np.arange(length), breaks, 0)
    plan = ItemPlan.make([item_span("image", grid, special)], Method("kcenter", 0.5, option))
    rows, index = reduce_item(plan, x)
    for torch_reducer in (None, tokencomp.make_reducer("kcenter")):
        method = MlxMethod("kcenter", 0.5, options=option)
        if torch_reducer is not None:
            monkeypatch.setattr(MlxMethod, "torch_reducer", torch_reducer)
        kept = method.kept(span, budget_shares([span])[0], mx.array(x.numpy()))
        assert kept.offsets.tolist() == index.tolist()
        if plan.merge:
            assert kept.sizes is not None
            assert kept.sizes.tolist() == unpack_sizes(rows, 8).tolist()
        got = x[index] if kept.features is None else torch.from_numpy(np.array(kept.features))
        assert torch.allclose(got, rows[:, :8], atol=1e-5)
