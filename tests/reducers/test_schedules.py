"""Published schedules, written out in loops."""

from __future__ import annotations

import pytest

from tokencomp import make_reducer
from tokencomp.errors import OptionError


def seen_by_layers(first: int, last: int, layers: int) -> list[float]:
    """AIM: layer l lets clamp(1 - (l - l1 + 1)/(l2 - l1), 0, 1) through, from layer l + 1 on."""
    seen = [1.0]
    for layer in range(layers - 1):
        through = 1.0 if layer < first else 1 - (layer - first + 1) / (last - first)
        seen.append(min(max(through, 0.0), 1.0))
    return seen


@pytest.mark.parametrize(("first", "last", "layers"), [(14, 22, 28), (13, 21, 32)])
@pytest.mark.parametrize("name", ["prune", "aim"])
def test_ramps_of_videos_and_images(name: str, first: int, last: int, layers: int) -> None:
    expected = seen_by_layers(first, last, layers)
    ratio = 1 - sum(expected) / layers
    options = {"start": first / layers, "stop": last / layers}
    plan = make_reducer(name, **options).plan(ratio, layers)
    assert plan.fractions(layers) == pytest.approx(expected, abs=1e-6)
    if first == 14:  # the default
        assert make_reducer(name).plan(ratio, layers).fractions(layers) == plan.fractions(layers)


@pytest.mark.parametrize("name", ["prune", "aim"])
@pytest.mark.parametrize("options", [{"start": 0.8}, {"stop": 1.5}, {"start": -0.1}])
def test_ramps_outside_the_depth_are_refused(name: str, options: dict) -> None:
    with pytest.raises(OptionError, match="start < stop"):
        make_reducer(name, **options)
