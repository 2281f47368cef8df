"""Options that cannot have an effect are refused, wherever a method comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, text
from support.family.audio import Qwen2Audio

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer, plan_from_json
from tokencomp.errors import OptionError, PlanError, RatioError
from tokencomp.method import Method
from tokencomp.serving.spec import ServerOptions

RANDOM = make_reducer("random")
ALONE = [
    ("condiv", {"power": 0.0, "margin": 0.9}, "margin=0.9 has no effect with power=0"),
    ("prune", {"schedule": "fastv", "start": 0.2}, "start=0.2 has no effect with schedule"),
]
PIXELS = [
    ("kcenter", {"pool": 1}),
    ("kcenter", {"std_weight": 5.0}),
    ("kcenter", {"temporal_weight": 0.0}),
    ("runlength", {"pool": 1}),
]


def refused_everywhere(name: str, options: dict[str, Any], message: str) -> None:
    """By `patch`, by `set`, in plans and in requests; a refused `set` changes nothing."""
    model = FAMILIES["qwen2_vl"].build()
    with pytest.raises(OptionError, match=message):
        tokencomp.patch(model, 0.5, reducer=name, **options)
    handle = tokencomp.patch(model, 0.5, reducer="uniform")
    plan = handle.plan
    with pytest.raises(OptionError, match=message):
        handle.set(reducer=name, **options)
    assert handle.plan == plan
    stage = {"layer": 0, "fraction": 0.5, "reducer": name, "options": options}
    with pytest.raises(OptionError, match=message):
        plan_from_json([stage])
    with pytest.raises(OptionError, match=f"{message}|operator only"):
        server = ServerOptions().resolve({"reducer": name, "ratio": 0.5, "options": options}, "hf")
        tokencomp.patching.check(model, server)


@pytest.mark.parametrize(("name", "options", "message"), ALONE)
def test_beside_other_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_reducer(name, **options)
    refused_everywhere(name, options, message)


@pytest.mark.parametrize(("name", "options"), PIXELS)
def test_where_no_pixels_are_seen(name: str, options: dict[str, Any]) -> None:
    """Only the stage before block 0 of the tower compares pixels."""
    refused_everywhere(name, options, f"{next(iter(options))}=.* has no effect in this stage")
    reducer = make_reducer(name, **options)
    TowerStage(0, 0.5, reducer)
    with pytest.raises(OptionError, match="no effect in this stage"):
        TowerStage(1, 0.5, reducer)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o, _ in ALONE] + PIXELS)
def test_such_options_change_nothing(name: str, options: dict[str, Any], monkeypatch: Any) -> None:
    """They are refused because the same tokens are kept, at the same places."""
    monkeypatch.setattr("tokencomp.reducers.base.check_effect", lambda *_: None)
    monkeypatch.setattr("tokencomp.plan.plan.check_effect", lambda *_: None)
    last = next(reversed(options))
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(2), family.video(4), text(5)]])
    logits = []
    for own in (options, {k: v for k, v in options.items() if k != last}):
        with torch.no_grad(), tokencomp.patch(model, 0.5, reducer=name, **own):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


def test_reducers_of_the_tower_without_a_stage_there() -> None:
    """A handle that is changed keeps its earlier options for a later ratio."""
    model = FAMILIES["qwen2_vl"].build()
    for ratio in (0.0, 0.5):
        with pytest.raises(OptionError, match="tower_reducer='random' has no effect"):
            tokencomp.patch(model, ratio, tower_reducer="random")
    with pytest.raises(OptionError, match="tower_ratio='auto' has no effect at ratio=0"):
        tokencomp.patch(model, 0.0, tower_ratio="auto")
    handle = tokencomp.patch(model, 0.75, tower_ratio="auto", tower_reducer="random")
    handle.set(ratio=0.0).set(ratio=0.75)
    assert handle.plan.tower == TowerStage(
        0, 1 - Method(ratio=0.75, tower_ratio="auto").dropped_cells, RANDOM
    )
    handle.set(tower_ratio=0.6).set(ratio=0.0)
    assert not handle.plan.active  # 0 turns every stage off, until there is a ratio again
    assert handle.set(ratio=0.75).plan.tower == TowerStage(0, 0.4, RANDOM)
    handle.set(tower_ratio=0.0)
    with pytest.raises(OptionError, match="tower_reducer='uniform' has no effect"):
        handle.set(tower_reducer="uniform")
    handle.set(ratio=0.5).set(tower_ratio=0.3)
    assert handle.plan.tower == TowerStage(0, 0.7, RANDOM)
    handle.set(ratio=0.0, tower_ratio=0.0)
    with pytest.raises(OptionError, match="tower_ratio='auto' has no effect at ratio=0"):
        handle.set(tower_ratio="auto")


@pytest.mark.parametrize("amount", ["auto", 0.4])
def test_requests_lower_the_stage_of_the_default(amount: Any) -> None:
    """A server's default is for its own ratio: a request at ratio 0 may leave it unnamed."""
    tower = {"tower_ratio": amount, "tower_reducer": "random"}
    server = ServerOptions.parse({"ratio": 0.75, "reducer": "uniform", **tower}, "hf")
    assert not server.resolve({"ratio": 0}, "hf").active
    assert server.resolve({"ratio": 0.75}, "hf").dropped_cells == pytest.approx(0.4)
    for request in ({"ratio": 0, **tower}, {"tower_ratio": 0, "tower_reducer": "random"}):
        with pytest.raises(OptionError, match="has no effect"):
            server.resolve(request, "hf")
    with pytest.raises(OptionError, match="has no effect"):
        ServerOptions.parse({"ratio": 0.5, "tower_reducer": "random"}, "hf")


def test_kinds_of_media_that_the_model_does_not_take() -> None:
    model, ears = FAMILIES["qwen2_vl"].build(), Qwen2Audio().build()
    plan = Plan((Stage(0, 0.5, make_reducer("uniform"), (("audio", 0.25),)),))
    for call in ({"ratio": {"audio": 0.5}}, {"plan": plan}):
        with pytest.raises(PlanError, match="audio has no effect: Qwen2-VL takes image and video"):
            tokencomp.patch(model, **call)
    with pytest.raises(PlanError, match="image has no effect"):
        tokencomp.patch(ears, {"image": 0.5, "audio": 0.5}, reducer="uniform")
    with pytest.raises(PlanError, match="video has no effect: InternVL takes image only"):
        tokencomp.patch(FAMILIES["internvl"].build(), {"video": 0.5})
    handle = tokencomp.patch(model, {"image": 0.5, "audio": 0.0}, reducer="uniform")
    with pytest.raises(RatioError, match="names no modality"):
        handle.set(ratio={})
    with pytest.raises(RatioError, match="names no modality"):
        Method("uniform", {})  # type: ignore[arg-type]
