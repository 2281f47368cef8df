"""Gradients behind any stage are those of the masked full-length run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import kinds, oracle, plans, tower
from support.families import FAMILIES, Family, text
from support.family.hybrid import HYBRID
from torch import Tensor, nn

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer

RANDOM = make_reducer("random")
# Every family with a tower stage. The mixture of experts of Qwen3-VL takes no float64; its tower is
# that of Qwen3-VL.
WITH_TOWERS = {**FAMILIES, **{name: HYBRID[name] for name in ("qwen3_5",) if name in HYBRID}}
NAMES = sorted(set(WITH_TOWERS) - {"qwen3_vl_moe"})
# One of every way in which a tower gets its full length back.
QUICK = {
    *(("qwen3_vl", "all"), ("llava_onevision", "all"), ("internvl", "all"), ("internvl", "tower")),
    *(("llava_next_video", "tower"), ("smolvlm", "tower"), ("vila", "tower")),
}
PLANS = {
    "tower": Plan((), TowerStage(0, 0.6, RANDOM)),
    "late": Plan((Stage(0, 0.3, RANDOM),), TowerStage(1, 0.6, RANDOM)),
    "entry": plans.make("entry", 4),
    "layer": plans.make("layer", 4),
    "all": Plan((Stage(0, 0.4, RANDOM), Stage(2, 0.2, RANDOM)), TowerStage(0, 0.6, RANDOM)),
}
CASES = [
    pytest.param(name, plan, marks=[] if (name, plan) in QUICK else [pytest.mark.long])
    for name in NAMES
    for plan in PLANS
]


def prompts(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """Ragged: two images of different grids, and a video; every row ends in text."""
    first = [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)]
    return tower.like(model, family.batch([first, [family.video(4), text(6, 4)]]))


def gradients(model: Any, inputs: dict[str, Tensor], **call: Any) -> dict[str, Tensor]:
    """Of the loss on the last four tokens of every row, by parameter; zeros where there is none."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=labels, use_cache=False, **call).loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_gradients_are_those_of_the_masked_run(name: str, plan: str) -> None:
    """Of every parameter of tower, projector and decoder, in float64 and with loud towers."""
    family = tower.deep(WITH_TOWERS[name])
    model = tower.build(family)
    inputs = prompts(family, model)
    stage = PLANS[plan].tower
    if stage is not None:
        with tower.block_inputs(model, stage.block) as full, torch.no_grad():
            model(**inputs, use_cache=False)
    block = 0 if stage is None else stage.block
    with (
        tokencomp.patch(model, plan=PLANS[plan]) as handle,
        tower.block_inputs(model, block) as short,
    ):
        got = gradients(model, inputs)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    seen = [torch.ones_like(x[..., 0], dtype=torch.bool) for x in short]
    if stage is not None:
        seen = tower.seen_rows(full, short)
        assert all(not mask.all() for mask in seen)
    with (
        tower.tower_masks(model, seen, block),
        oracle.layer_masks(model, family, masks),
        kinds.absent_columns(family.decoder(model), masks),
    ):
        expected = gradients(model, inputs, position_ids=family.positions(model, inputs))
    whole = gradients(model, inputs, position_ids=family.positions(model, inputs))
    for key, value in expected.items():
        scale = max(float(whole[key].abs().max()), 1e-3)
        assert (got[key] - value).abs().max() < 1e-5 * scale, key
    assert any((whole[key] - value).abs().max() > 1e-3 for key, value in expected.items())
