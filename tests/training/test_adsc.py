"""ADSC: the reducer without training against plain loops, and the training of its adapter."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.trained import tiny as make_tiny

import tokencomp
from tokencomp import Tokens, make_reducer
from tokencomp.errors import (
    OptionError,
)
from tokencomp.inputs.loading import load_model
from tokencomp.training.adsc import AdscConfig, train_adsc
from tokencomp.training.data import load_batch, questions

pytest.importorskip("peft")
SMALL = AdscConfig(
    schedule=("0.67", "0|0.5"),
    steps=4,
    batch=2,
    samples=8,
    kind="image",
    evaluate=2,
    save_every=1,
    ratios=(0.0, 0.67),
)


def copied(tiny: Any) -> tuple[Any, Any]:
    """PEFT changes the model it wraps."""
    return copy.deepcopy(tiny[0]), tiny[1]


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("adsc")
    return train_adsc(*copied(tiny), data, output, SMALL), output


def test_a_finished_run_is_resumed_and_another_is_refused(
    trained: Any, tiny: Any, data: str
) -> None:
    _, output = trained
    before = (output / "adapter_model.safetensors").read_bytes()
    train_adsc(*copied(tiny), data, output, SMALL)
    assert (output / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(OptionError, match="rank"):
        train_adsc(*copied(tiny), data, output, replace(SMALL, rank=4))


def test_schedules_run_in_both_directions() -> None:
    mild = AdscConfig(schedule=("0.5", "0.67", "0.8"), steps=9)
    harsh = AdscConfig(schedule=("0.8", "0.67", "0.5"), steps=9)
    ratios = [mild.ratio_at(step) for step in range(9)]
    assert ratios == [0.5] * 3 + [0.67] * 3 + [0.8] * 3
    assert [harsh.ratio_at(step) for step in range(9)] == ratios[::-1]
    turns = AdscConfig(schedule=("0", "0.5|0.8"), steps=8)
    assert [turns.ratio_at(step) for step in range(8)] == [0.0] * 4 + [0.5, 0.8] * 2


@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", *(pytest.param(n, marks=pytest.mark.long) for n in ("llava_onevision", "vila"))],
)
def test_every_embedded_family_trains(name: str, data: str, tmp_path: Path) -> None:
    """Only the adapter changes; loaded by PEFT, it compresses and answers as it was trained."""
    from peft import PeftModel

    folder = tmp_path / "model"
    plain, processor = make_tiny(folder, name=f"tiny-{name.replace('_', '-')}")
    tuned = train_adsc(
        *load_model(str(folder), device="cpu"), data, tmp_path / "out", replace(SMALL, evaluate=0)
    )
    states = load_file(tmp_path / "out" / "adapter_model.safetensors")
    changed = [value for key, value in states.items() if ".lora_B." in key]
    assert changed and all(value.abs().max() > 0 for value in changed)
    again = PeftModel.from_pretrained(load_model(str(folder), device="cpu")[0], tmp_path / "out")
    inputs, _ = load_batch([questions(data, "image", 1)[0]], processor, 8)
    logits = []
    for model in (tuned, again.eval()):
        with tokencomp.patch(model, 0.67, reducer="adsc") as handle, torch.no_grad():
            logits.append(model(**inputs).logits[:, -1])
            assert handle.stats.ratio == pytest.approx(0.67, abs=0.06)
    assert torch.equal(*logits)
    with tuned.disable_adapter(), torch.no_grad():
        assert torch.equal(tuned(**inputs).logits, plain(**inputs).logits)


def kept(grid: tuple[int, int, int], keep: int, index: list[int] | None = None) -> list[int]:
    """Rows that are kept of the patches `index` of a video, by default of all."""
    n = grid[0] * grid[1] * grid[2] if index is None else len(index)
    tokens = Tokens(torch.zeros(n, 4), [grid], [keep], [n], ["video"])
    tokens.index = None if index is None else torch.tensor(index)
    return make_reducer("adsc").reduce(tokens).patches.tolist()


def loop_windows(live: list[int], quota: int) -> list[int]:
    kept = []
    for i in range(quota):
        window = live[i * len(live) // quota : (i + 1) * len(live) // quota]
        kept.append(window[-1])
    return kept


def loop_quotas(keep: int, counts: list[int]) -> list[int]:
    quotas, seen = [], 0
    for count in counts:
        before = keep * seen // sum(counts)
        seen += count
        quotas.append(keep * seen // sum(counts) - before)
    return quotas


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 3, 5), (7, 1, 1)])
def test_windows_match_a_plain_loop(grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    for keep in range(1, t * h * w):
        quotas = loop_quotas(keep, [h * w] * t)
        expected: list[int] = []
        for frame, quota in enumerate(quotas):
            live = list(range(frame * h * w, (frame + 1) * h * w))
            expected += loop_windows(live, quota)
        assert kept(grid, keep) == expected


def test_later_stages_count_live_tokens() -> None:
    live = [0, 2, 3, 4, 6, 8, 10, 12, 13]  # some patches of both frames are gone
    frames = [[i for i in live if i < 8], [i for i in live if i >= 8]]
    for keep in range(1, 9):
        quotas = loop_quotas(keep, [len(f) for f in frames])
        parts = [loop_windows(own, quota) for own, quota in zip(frames, quotas, strict=True)]
        assert [live[i] for i in kept((2, 2, 4), keep, live)] == [*parts[0], *parts[1]]


def test_natural_plan_is_the_published_mean() -> None:
    """Windows of two after layers 4, 11 and 16 of 32: about 192 of 576 tokens per layer."""
    natural = (4 + 7 / 2 + 5 / 4 + 16 / 8) / 32
    plan = make_reducer("adsc").plan(1 - natural, 32)
    assert [s.layer for s in plan.stages] == [4, 11, 16]
    assert [s.fraction for s in plan.stages] == pytest.approx([1 / 2, 1 / 4, 1 / 8], abs=1e-6)
    assert natural * 576 == pytest.approx(192, abs=2)
