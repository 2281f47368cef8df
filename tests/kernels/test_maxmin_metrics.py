"""maxmin_select by root mean squares of differences, and from the most isolated row."""

import functools
import math

import pytest
import torch
from support.max_min import check_greedy, differences, distances
from tokencomp.kernels import maxmin_select
from tokencomp.kernels.maxmin_select import naive

ordered_choices = functools.partial(maxmin_select, ordered=True)


@pytest.mark.parametrize(
    ("lengths", "counts", "dim", "rounds", "weighted", "dtype"),
    [
        ([34, 0, 3, 17], [33, 0, 3, 12], 7, False, False, torch.bfloat16),
        ([34, 0, 3, 17], [33, 0, 3, 12], 7, False, True, torch.float32),
        ([20, 66], [0, 30], 5, True, False, torch.float32),
        ([20, 66], [0, 30], 5, True, True, torch.float32),
    ],
)
def test_root_mean_square(
    place: torch.device, lengths: list[int], counts: list[int], dim: int, rounds: bool,
    weighted: bool, dtype: torch.dtype, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Spans of all lengths; half of the rows are copies, whose distance is exactly 0."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = 3.0 + torch.randn(sum(lengths), dim)
    x[::2] = x[torch.randint(len(x), (len(x[::2]),))]
    x, weights = x.to(dtype), torch.rand(len(x)) if weighted else None
    margin = torch.rand(len(lengths)) if weighted else None
    got = ordered_choices(
        x.to(place), counts, None if weights is None else weights.to(place), spans=lengths,
        metric="rms", margin=None if margin is None else margin.to(place),
    ).cpu()  # fmt: skip
    start = 0
    for s, (rows, picks) in enumerate(zip(x.split(lengths), got.split(counts), strict=True)):
        order = (picks - start).tolist()
        part = torch.ones(len(rows)) if weights is None else weights[start : start + len(rows)]
        start += len(rows)
        if not order:
            continue
        wide = rows.double()
        far = (wide - wide.mean(0)).square().sum(1)
        first = far if weights is None else part.double()
        assert first[order[0]] >= first.max() - 1e-4
        check_greedy(
            rows, order, part, 1e-6, 0.0 if margin is None else float(margin[s]),
            differences(rows),
        )  # fmt: skip


@pytest.mark.parametrize("metric", ["cosine", "rms"])
@pytest.mark.parametrize("rounds", [False, True], ids=["at once", "in rounds"])
def test_isolated_start(
    place: torch.device, rounds: bool, metric: str, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first choice is the row whose nearest other row is farthest, also block by block."""
    if rounds:
        request.getfixturevalue("short_rounds")
        monkeypatch.setattr(naive, "GRAM_ELEMENTS", 300)
    lengths = [70, 1, 33, 70]
    x = torch.randn(sum(lengths), 6)
    got = ordered_choices(x.to(place), 1, spans=lengths, start="isolated", metric=metric).tolist()
    start = 0
    for part, pick in zip(x.split(lengths), got, strict=True):
        distance = differences(part) if metric == "rms" else distances(part)
        nearest = distance.fill_diagonal_(math.inf).amin(1)
        assert nearest[pick - start] >= nearest.max() - 1e-5
        start += len(part)


def test_root_mean_square_sees_lengths(place: torch.device) -> None:
    """Rows of one direction differ in length alone; the cosine takes all of them for copies."""
    x = torch.tensor([0.0, 1.0, 4.0, 6.0, 10.0])[:, None].expand(5, 3)
    for first, want in ((0, [0, 4, 2, 3]), (4, [4, 0, 2, 3])):
        start = torch.tensor([first], device=place)
        assert ordered_choices(x.to(place), 4, start=start, metric="rms").tolist() == want
