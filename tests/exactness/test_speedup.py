"""A speedup: exact, by the size of an item alone, and as many FLOPs fewer as asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from PIL import Image
from support import tower
from support.families import FAMILIES, Family, text
from torch.utils.flop_counter import FlopCounterMode

import tokencomp
from tokencomp.errors import (
    OptionError,
    PlanError,
    RatioError,
    TokenCompError,
    UnsupportedModelError,
)
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs
from tokencomp.method import Method
from tokencomp.plan.speed import PATHS, at, solve
from tokencomp.serving import engines

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def planned(family: Family, speedup: float, **options: Any) -> Any:
    setting = dict(reducer="random", tower_reducer="random", merge=False, **options)
    with tokencomp.patch(family.build(), speedup=speedup, **setting) as handle:
        return handle.plan


@pytest.mark.parametrize("name", [*PACKED, "llava_onevision"])
def test_drop_equals_mask(name: str) -> None:
    """Images and a clip of different sizes in a ragged batch."""
    family = tower.deep(FAMILIES[name])
    model = tower.build(family, "sdpa")
    first = [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)]
    rows = [first, [family.video(4), text(3, 4)], [text(9, 6)]]
    inputs = tower.like(model, family.batch(rows))
    stats = tower.check_drop_equals_mask(family, model, inputs, planned(family, 1.6), "sdpa")
    assert stats.tower_ratio > 0.1 and stats.ratio > 0.3


@pytest.mark.parametrize("name", PACKED)
def test_what_an_item_keeps_follows_from_it_alone(name: str) -> None:
    """Alone, after another image, with another question, and in a ragged batch with a video."""
    family = FAMILIES[name]
    model, image = family.build(), family.image(0)
    batches = [
        [[text(3), image, text(4, 2)]],
        [[text(3), family.image(1), image, text(30, 5)]],
        [[family.video(4), text(2)], [text(1), image, text(9)]],
    ]
    found = []
    with tokencomp.patch(model, speedup=2) as handle, torch.no_grad():
        for batch in batches:
            model(**family.batch(batch))
            last = len(batch) - 1
            found.append((handle.stats.tower_kept(last)[-1], handle.stats.kept(last)[0][-1]))
    assert found[0] == found[1] == found[2]


PARTS = re.compile(r".*\.(layers|blocks)\.\d+|.*(merger|multi_modal_projector|merger_list\.\d+)")


def flops(model: Any, inputs: dict[str, Any]) -> int:
    """Of the blocks of the tower, of the projector and of the decoder layers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1, use_cache=True)
    by_module = counter.get_flop_counts().items()
    return sum(sum(n.values()) for name, n in by_module if PARTS.fullmatch(name))


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-qwen3-vl", "tiny-llava-onevision"])
def test_counted_flops_fall_as_planned(name: str) -> None:
    """PyTorch counts them, with the text, which the plan leaves out, and all pairs of a mask."""
    model, processor = load_model(name, device="cpu")
    model.set_attn_implementation("eager")  # whose products PyTorch counts
    picture = Image.effect_noise((448, 448), 80).convert("RGB")
    inputs = build_inputs(processor, [[picture]], ["?"])
    full = flops(model, inputs)
    for speedup in (1.5, 2.0, 3.0):
        cheap = dict(reducer="uniform", tower_reducer="uniform", merge=False)
        with tokencomp.patch(model, speedup=speedup, **cheap) as handle:
            counted = full / flops(model, inputs)
            stats = handle.stats
        assert stats.speedup == pytest.approx(counted, rel=0.09), (speedup, stats)
        assert 0.88 * speedup < counted < 1.12 * speedup, (speedup, stats)


class Linear:
    """A model in which tower and decoder take one FLOP per cell and token."""

    def flops(self, modality: str, cells: int, frames: int, point: Any) -> float:
        return cells * (1 - point.tower) + cells * (1 - point.ratio)


@pytest.mark.parametrize("modality", PATHS)
def test_the_point_on_a_path(modality: str) -> None:
    work, path = Linear(), PATHS[modality]
    for speedup in (1.2, 1.5, 2.0, 3.0, 5.0):
        point = solve(work, speedup, modality, 1000, 1)
        assert work.flops(modality, 1000, 1, point) == pytest.approx(2000 / speedup)
        assert point.tower <= point.ratio  # the decoder gets no more than the tower keeps
    assert solve(work, 19.0, modality, 1000, 1) == path[-1] == at(path, len(path) - 1)
    places = [at(path, i / 10) for i in range(10 * (len(path) - 1) + 1)]
    assert places == sorted(places, key=lambda p: (p.tower, p.ratio))


@pytest.mark.parametrize("speedup", [1, 0.5, 0, -2, "2", None, True, 50, float("nan")])
def test_bad_speedups(speedup: Any) -> None:
    if speedup is None:
        return
    with pytest.raises(RatioError, match="speedup"):
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), speedup=speedup)


WRONG: list[tuple[dict[str, Any], type[TokenCompError], str]] = [
    ({"ratio": 0.5}, OptionError, "Leave one out"),
    ({"budget": 64}, OptionError, "Leave one out"),
    ({"tower_ratio": 0.4}, OptionError, "Leave one out"),
    ({"plan": []}, OptionError, "Leave one out"),
    ({"reducer": "prune"}, OptionError, "acts at entry"),
    ({"reducer": "pixelprune"}, OptionError, "acts at entry"),
]


@pytest.mark.parametrize(("more", "error", "words"), WRONG, ids=str)
def test_what_does_not_go_together(
    more: dict[str, Any], error: type[TokenCompError], words: str
) -> None:
    with pytest.raises(error, match=words):
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), **{"speedup": 2, **more})


def test_what_no_setting_reaches() -> None:
    model, _ = load_model("tiny-qwen2-vl", device="cpu")
    with pytest.raises(RatioError, match=r"at most \d+(\.\d)? is possible"):
        tokencomp.patch(model, speedup=19)
    model, _ = load_model("tiny-gemma3", device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"ratio=0\.75"):
        tokencomp.patch(model, speedup=2)


def test_changes_of_a_patch_and_of_requests() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(4)]])
    with tokencomp.patch(model, 0.5, tower_ratio=0.2) as handle, torch.no_grad():
        for change, tower_stage in (
            ({"speedup": 2}, True), ({"ratio": 0.5}, False), ({"speedup": 1.5}, True),
            ({"budget": 4}, False),
        ):  # fmt: skip
            handle.set(**change)
            assert (handle.plan.tower is not None) == tower_stage
            model(**inputs)
            assert ("speedup" in str(handle.stats)) == ("speedup" in change)
        assert "speedup=3" in repr(handle.set(speedup=3))
        with pytest.raises(PlanError, match="speedup"):
            tokencomp.plan_to_json(handle.plan)
    method = Method(speedup=2.0)
    assert method.active and method.requested == {"speedup": 2.0} and method != Method(speedup=3.0)
    assert Method(ratio=0.5).override({"speedup": 2.0}) == Method(speedup=2.0)
    assert engines.engine("hf").fit(method) == method
    for name in ("vllm", "sglang", "mlx"):
        with pytest.raises(OptionError, match="FLOPs"):
            engines.engine(name).fit(method)
    with pytest.raises(OptionError, match="needs the model"):
        method.stages(8, 1)
