"""Published schedules, written out in loops."""

from __future__ import annotations

import pytest

from tokencomp import make_reducer
from tokencomp.errors import OptionError
from tokencomp.serving.servable import serving_safe


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


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_a_late_baseline_cuts_once_at_its_depth(name: str) -> None:
    """20 layers of 28 see all tokens; the other 8 see what the ratio leaves of the work."""
    reducer = make_reducer(name, at=20 / 28)
    (cut,) = reducer.plan(0.2, 28).stages
    assert (cut.layer, cut.fraction) == (20, pytest.approx(1 - 0.2 * 28 / 8))
    assert not serving_safe(reducer) and not reducer.deviation(0.2, 28)
    both = make_reducer(f"condiv+{name}", at=20 / 28, share=0.8)
    stages = both.plan(0.5, 28).stages
    assert [s.layer for s in stages] == [0, 20] and both.plan(0.5, 28).ratio(28) == pytest.approx(
        0.5
    )
    assert [s.reducer.name for s in stages] == ["condiv", name]


def test_a_cut_that_cannot_meet_the_ratio_is_earlier_and_marked() -> None:
    late = make_reducer("random", at=0.9)
    (cut,) = late.plan(0.5, 28).stages
    assert cut.layer == 13 and "before layer 13" in late.deviation(0.5, 28)
    both = make_reducer("divprune+random", at=0.9)
    assert both.deviation(0.75, 28) and not both.deviation(0.05, 28)
    with pytest.raises(OptionError, match="give random and uniform a depth"):
        make_reducer("divprune+random")
    with pytest.raises(OptionError, match=r"at=1\.0; allowed: a number from 0"):
        make_reducer("uniform", at=1.0)


def test_sparsevlm_at_its_published_ratio() -> None:
    """Layers 0 … 2 of 32 see 576 tokens, and those behind layers 2, 6 and 15 300, 200 and 118."""
    seen = [576.0] * 3 + [300.0] * 4 + [200.0] * 9 + [118.0] * 16
    ratio = 1 - sum(seen) / 32 / 576
    reducer = make_reducer("sparsevlm")
    assert reducer.plan(ratio, 32).fractions(32) == pytest.approx([n / 576 for n in seen])
    assert not reducer.deviation(ratio, 32) and reducer.deviation(0.9, 32)
    assert all(s.reducer.score == "rater_query" for s in reducer.plan(ratio, 32).stages)
