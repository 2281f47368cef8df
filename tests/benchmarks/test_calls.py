"""The calls and reads that a patch adds are constants, whatever the number of images."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels.calls import (
    CASES,
    COMPARATORS,
    OFF,
    REDUCERS,
    decode_step,
    measure,
    tiny_model,
)

CALLS_PER_IMAGE = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize(
    "reducer", [*REDUCERS, *(pytest.param(name, marks=pytest.mark.long) for name in COMPARATORS)]
)
def test_a_prefill_does_not_grow_with_images(model: Any, reducer: str) -> None:
    """A further image or sample costs next to nothing."""
    shapes = ((1, 1), (2, 2), (3, 3))  # images × samples
    one, four, nine = (measure(model, reducer, *shape)[0] for shape in shapes)
    assert nine.calls - four.calls <= (9 - 4) * CALLS_PER_IMAGE
    assert one.reads == four.reads == nine.reads


@pytest.mark.parametrize("reducer", CASES)
def test_a_decode_step_costs_as_much_as_without_a_patch(model: Any, reducer: str) -> None:
    assert decode_step(model, reducer) == (0, 0)


def test_ratio_0_adds_nothing_to_a_prefill(model: Any) -> None:
    for shape in ((1, 1), (3, 2)):
        row = measure(model, OFF, *shape)[0]
        assert (row.calls, row.reads) == (0, 0)
