"""The calls and reads that a patch adds are constants, whatever the number of images."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tokencomp
from benchmarks.kernels.calls import (
    CASES,
    COMPARATORS,
    LAYERS,
    OFF,
    REDUCERS,
    decode_step,
    measure,
    patched,
    step_after,
    tiny_model,
)

CALLS_PER_MERGING_LAYER = 18
CALLS_PER_STAGE, CALLS_PER_IMAGE = 105, 6  # the goal is 120 and 6


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def deep() -> Any:
    return tiny_model(2 * LAYERS)


@pytest.fixture(scope="module")
def layout_reads(model: Any) -> int:
    """Reads of where spans and padding stand; `uniform` looks at no feature."""
    return measure(model, "uniform", 1, 1)[0].reads


def step_functions(model: Any, reducer: str) -> Counter[str]:
    """Python functions of the library that a decode step runs, by name."""
    package, names = str(Path(tokencomp.__file__).parent), Counter[str]()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            names[frame.f_code.co_name] += 1

    with patched(model, reducer), torch.no_grad():
        step = step_after(model)
        step()
        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
    return names


@pytest.mark.parametrize(
    "reducer", [*REDUCERS, *(pytest.param(name, marks=pytest.mark.long) for name in COMPARATORS)]
)
def test_a_prefill_does_not_grow_with_images(model: Any, reducer: str) -> None:
    """A further image or sample costs next to nothing."""
    shapes = ((1, 1), (2, 2), (3, 3))  # images × samples
    one, four, nine = (measure(model, reducer, *shape)[0] for shape in shapes)
    assert nine.calls - four.calls <= (9 - 4) * CALLS_PER_IMAGE
    assert one.reads == four.reads == nine.reads


@pytest.mark.parametrize("reducer", REDUCERS)
def test_one_image_costs_a_constant_per_stage(model: Any, reducer: str, layout_reads: int) -> None:
    """Beyond the layout of the prompt one read per stage: whether the values are finite.

    Merging adds calls per layer, and reads how many rows the cache is to hold.
    """
    row, merges = measure(model, reducer, 1, 1)[0], reducer == "auto"
    assert row.calls <= CALLS_PER_STAGE * row.stages + CALLS_PER_MERGING_LAYER * LAYERS * merges
    assert row.reads <= 4 + row.stages
    assert row.reads - layout_reads <= row.stages + merges


@pytest.mark.parametrize("reducer", CASES)
def test_a_decode_step_costs_as_much_as_without_a_patch(model: Any, reducer: str) -> None:
    assert decode_step(model, reducer) == (0, 0)


def test_ratio_0_adds_nothing_to_a_prefill(model: Any) -> None:
    for shape in ((1, 1), (3, 2)):
        row = measure(model, OFF, *shape)[0]
        assert (row.calls, row.reads) == (0, 0)


def test_nothing_of_ours_runs_at_ratio_0(model: Any) -> None:
    assert not step_functions(model, OFF)


@pytest.mark.parametrize("reducer", ("auto", "bipartite", "fastv", "pyramiddrop"))
def test_a_decode_step_runs_no_python_per_layer(model: Any, deep: Any, reducer: str) -> None:
    """Neither entry plans nor layer plans do; these reducers have as many stages in both models."""
    steps = [step_functions(m, reducer) for m in (deep, model)]
    assert steps[0] == steps[1] and steps[0].total() > 0
    assert not steps[0].keys() & {"_layer", "_attention"}
