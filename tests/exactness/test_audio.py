"""Clips of audio are spans like images, with ratios of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.families import text
from support.family.audio import Qwen2Audio, Qwen3OmniThinker, Qwen25OmniThinker, Voxtral

import tokencomp
from tokencomp import Plan, Stage, make_reducer, plan_from_json, plan_to_json
from tokencomp.adapters.verified import verified_types
from tokencomp.errors import OptionError, PlanError, RatioError

EARS: dict[str, Any] = {
    f.name: f
    for f in (Qwen2Audio(), Voxtral(), Qwen25OmniThinker(), Qwen3OmniThinker())
    if f.name in verified_types()
}


@pytest.mark.parametrize("reducer", ["uniform", "condiv", "divprune", "bipartite"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if "qwen3" in n else n for n in EARS]
)
def test_dropping_equals_masking(name: str, reducer: str) -> None:
    """A ragged batch with one clip, two clips, and none; decoding."""
    family = EARS[name]
    model = family.build()
    inputs = family.batch(
        [
            [text(3), family.audio(9 if name != "voxtral" else 12), text(5, 2)],
            [text(4), family.audio(), text(2, 5), family.audio(), text(3, 6)],
            [text(12, 6)],
        ]
    )
    handle, out, masks = oracle.generated(model, family, inputs, ratio=0.5, reducer=reducer)
    stats = handle.stats
    first = 12 if name == "voxtral" else 9
    assert [[s.grid for s in row] for row in stats.spans] == [
        [(first, 1, 1)],
        [(12, 1, 1), (12, 1, 1)],
        [],
    ]
    assert {s.modality for row in stats.spans for s in row} == {"audio"}
    assert stats.tokens_after[1] == [12] * 4
    if reducer != "bipartite":  # kept rows hold means of others
        assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


def test_ratios_by_modality() -> None:
    """Of an image, a video and a clip; as a mapping, and as stages."""
    family = EARS["qwen2_5_omni_thinker"]
    model = family.build()
    media = [family.image(0), family.whole_video(4), family.audio()]
    row: list[Any] = [text(3)]
    for item in media:
        row += [item, text(2)]
    inputs = family.batch([row])
    by_modality = {"video": 0.75, "audio": 0.5}
    plan = Plan((Stage(0, 1.0, make_reducer("uniform"), (("video", 0.25), ("audio", 0.5))),))
    for options in ({"ratio": by_modality, "reducer": "uniform"}, {"plan": plan}):
        with torch.no_grad(), tokencomp.patch(model, **options) as handle:
            model(**inputs)
            stats = handle.stats
            assert [(s.modality, s.visual) for s in stats.spans[0]] == [
                ("image", 16), ("video", 16), ("audio", 12),
            ]  # fmt: skip
            assert stats.counts[0] == [[16], [4], [6]]
            assert stats.ratio == pytest.approx(18 / 44)
            handle.set(ratio={"audio": 0.75}, reducer="uniform")
            model(**inputs)
            assert handle.stats.counts[0] == [[16], [16], [3]]
            handle.set(ratio=0.5)
            model(**inputs)
            assert handle.stats.counts[0] == [[8], [8], [6]]


def test_a_plan_with_kinds_survives_json() -> None:
    plan = Plan((Stage(0, 0.5, make_reducer("uniform"), (("video", 0.25),)),))
    data = plan_to_json(plan)
    assert data[0]["by_modality"] == {"video": 0.25}
    assert plan_from_json(data) == plan
    assert plan.ratio(4) == 0.5 and plan.ratio(4, "video") == 0.75
    assert hash(plan) == hash(plan_from_json(data))


def test_bad_ratios_by_modality() -> None:
    model = EARS["qwen2_audio"].build()
    with pytest.raises(RatioError, match="'sound' is no modality"):
        tokencomp.patch(model, {"sound": 0.5})
    with pytest.raises(RatioError, match="ratio of audio"):
        tokencomp.patch(model, {"audio": 1.5})
    with pytest.raises(OptionError, match="tower_ratio"):
        tokencomp.patch(model, {"audio": 0.5}, tower_ratio=0.2)
    with pytest.raises(PlanError, match="by_modality"):
        Stage(0, 0.5, make_reducer("uniform"), (("sound", 0.5),))
    stages = (
        Stage(0, 0.5, make_reducer("uniform"), (("audio", 0.25),)),
        Stage(2, 0.4, make_reducer("uniform")),
    )
    with pytest.raises(PlanError, match="non-increasing"):
        Plan(stages)
