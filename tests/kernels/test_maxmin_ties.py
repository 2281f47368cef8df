"""maxmin_select chooses as in exact arithmetic where scores differ by rounding alone."""

import functools

import pytest
import torch
from support.max_min import differences, distances
from tokencomp.kernels import maxmin_select
from torch import Tensor

ordered_choices = functools.partial(maxmin_select, ordered=True)
ROUNDING = 2e-7  # relative, as two batches of another shape differ


def noisy(x: Tensor) -> Tensor:
    return (x * (1 + ROUNDING * torch.randn_like(x))).float()


def in_loops(distance: Tensor, weights: list[float], k: int, start: int | None) -> list[int]:
    """The rule in plain loops: of the scores above (1 - 4e-6) of the best, the first."""
    rows, order = range(len(weights)), []

    def first(scores: dict[int, float]) -> int:
        return min(i for i, s in scores.items() if s >= (1 - 4e-6) * max(scores.values()))

    if start is None:  # the most isolated row
        nearest = {i: min(float(distance[i, j]) for j in rows if j != i) for i in rows}
        start = first(nearest)
    order = [start]
    while len(order) < k:
        left = [i for i in rows if i not in order]
        order.append(
            first({i: weights[i] * min(float(distance[i, j]) for j in order) for i in left})
        )
    return order


@pytest.mark.parametrize("metric", ["cosine", "rms"])
@pytest.mark.parametrize("start", [None, "isolated"])
def test_two_rows(place: torch.device, metric: str, start: str | None) -> None:
    """Each is as far from the other and from their mean; rounding decided."""
    for dim in (3, 64):
        x = torch.randn(40, dim, dtype=torch.float64)
        if metric == "cosine":
            x = x / x.norm(dim=1, keepdim=True)  # so that the mean is as far from both
        got = maxmin_select(noisy(x).to(place), 1, spans=2, start=start, metric=metric)
        assert got.tolist() == list(range(0, 40, 2))


@pytest.mark.parametrize(
    ("isolated", "weighted", "rounds", "metric"),
    [
        (False, False, False, "cosine"),
        (False, True, True, "cosine"),
        (True, True, False, "cosine"),
        (False, True, False, "rms"),
        (True, False, True, "rms"),
    ],
)
def test_copies_up_to_rounding(
    place: torch.device, isolated: bool, weighted: bool, rounds: bool, metric: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """12 looks of several rows each, in any order."""
    if rounds:
        request.getfixturevalue("short_rounds")
    look = torch.randint(12, (108,))
    x = torch.randn(12, 48, dtype=torch.float64)[look]
    weights = 0.5 ** torch.randint(3, (12,)).double()[look] if weighted else torch.ones(108)
    exact = distances(x) if metric == "cosine" else differences(x)
    begin = None if isolated else int(weights.argmax())
    expected = in_loops(exact, weights.tolist(), 30, begin)
    assert weighted or len(set(look[expected[:12]].tolist())) == 12
    options = {"start": "isolated" if isolated else torch.tensor([begin], device=place)}
    given = noisy(weights).to(place) if weighted else None
    got = ordered_choices(noisy(x).to(place), 30, given, metric=metric, **options)
    assert got.tolist() == expected


@pytest.mark.parametrize(("metric", "rounds"), [("cosine", True), ("rms", False)])
def test_choices_that_are_no_ties(
    place: torch.device, metric: str, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """Random rows differ by more than rounding: every choice is the best one, in plain loops."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x, weights = torch.randn(90, 24).double(), torch.rand(90)
    exact = distances(x) if metric == "cosine" else differences(x)
    start = int(weights.argmax())
    expected = in_loops(exact, weights.tolist(), 40, start)
    got = ordered_choices(x.float().to(place), 40, weights.to(place), metric=metric)
    assert got.tolist() == expected
