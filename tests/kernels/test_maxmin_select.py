"""maxmin_select: every choice is the best one left, by a dense fp64 distance matrix."""

import importlib
import math

import pytest
import torch
from tokencomp.kernels import KernelError, maxmin_select
from tokencomp.kernels.maxmin_select import naive
from torch import Tensor


def distances(x: Tensor, centred: bool) -> Tensor:
    x = x.double()
    if centred:
        x = x - x.mean(0)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > 0, x / norm, 0.0)
    return (1 - x @ x.T).clamp(min=0)


def check_greedy(
    x: Tensor, order: list[int], weights: Tensor | None, centred: bool, tolerance: float
) -> None:
    """Each choice after the first reaches the best score left, up to rounding."""
    assert len(set(order)) == len(order)
    distance = distances(x, centred)
    weights = torch.ones(len(x)) if weights is None else weights
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64)
    for step, choice in enumerate(order[1:], start=1):
        nearest = torch.minimum(nearest, distance[order[step - 1]])
        score = nearest * weights.double()
        score[order[:step]] = -1.0
        assert score[choice] >= score.max() - tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("lengths", "counts", "dim"),
    [
        ([1], [1], 4),
        ([40, 40, 40], [7, 7, 7], 70),
        ([60, 0, 1, 90], [60, 0, 1, 20], 33),
        ([150, 150], [20, 20], 8),
    ],
    ids=str,
)
def test_greedy(
    place: torch.device, lengths: list[int], counts: list[int], dim: int, weighted: bool,
    centred: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    x = (torch.randn(sum(lengths), dim) + 0.3).to(dtype)
    weights = torch.rand(len(x)) if weighted else None
    got = maxmin_select(
        x.to(place), counts, None if weights is None else weights.to(place), spans=lengths,
        centred=centred, ascending=False,
    ).cpu()  # fmt: skip
    start = 0
    for rows, picks in zip(x.split(lengths), got.split(counts), strict=True):
        order = (picks - start).tolist()
        if not order:
            start += len(rows)
            continue
        part = None if weights is None else weights[start : start + len(rows)]
        mean = rows.double().mean(0)
        far = 1 - torch.nn.functional.cosine_similarity(rows.double(), mean[None])
        first = far if part is None else part.double()
        assert first[order[0]] >= first.max() - 1e-6
        # Centred rows of 16-bit inputs are held in fp16 by the Triton path.
        check_greedy(rows, order, part, centred, 1e-5 if dtype == torch.float32 else 1e-3)
        start += len(rows)


@pytest.mark.parametrize("centred", [False, True])
def test_long_spans_take_one_launch_per_step(
    place: torch.device, centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans above the limit store no cosines; both ways must choose alike."""
    x, weights = torch.randn(150, 40), torch.rand(150)
    want = maxmin_select(x.to(place), [20, 9], weights.to(place), spans=[110, 40], centred=centred)
    monkeypatch.setattr(naive, "GRAM_ELEMENTS", 1)
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.maxmin_select.triton")
        monkeypatch.setattr(triton, "MAX_GRAM_ROWS", 64)
    got = maxmin_select(x.to(place), [20, 9], weights.to(place), spans=[110, 40], centred=centred)
    assert torch.equal(got, want)


def test_spans_in_several_groups(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(90, 16, device=place)
    want = torch.cat([maxmin_select(x[i : i + 30], 5) + i for i in (0, 30, 60)])
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.maxmin_select.triton")
        monkeypatch.setattr(triton, "GRAM_ELEMENTS", 2000)
    assert torch.equal(maxmin_select(x, 5, spans=30), want)


def test_start_ties_and_duplicates(place: torch.device) -> None:
    x = torch.eye(4).repeat(2, 1)  # rows 4..7 repeat rows 0..3
    start = torch.tensor([6], device=place)
    got = maxmin_select(x.to(place), 8, start=start, ascending=False)
    # Equal distances go to the lower row; once all directions are taken only copies are left.
    assert got.tolist() == [6, 0, 1, 3, 2, 4, 5, 7]
    assert maxmin_select(x.to(place), 4, start=start).tolist() == [0, 1, 3, 6]


def test_prefixes_are_nested(place: torch.device) -> None:
    x = torch.randn(50, 12, device=place)
    full = maxmin_select(x, 50, ascending=False)
    assert sorted(full.tolist()) == list(range(50))
    assert torch.equal(maxmin_select(x, 13, ascending=False), full[:13])


def test_zero_weights_come_last(place: torch.device) -> None:
    x = torch.randn(30, 8, device=place)
    weights = torch.zeros(30, device=place)
    weights[10:20] = 1.0
    assert maxmin_select(x, 10, weights).tolist() == list(range(10, 20))


def test_centring_ignores_a_common_offset(place: torch.device) -> None:
    x = torch.randn(40, 16)
    start = torch.tensor([0], device=place)
    want = maxmin_select(x.to(place), 10, start=start, centred=True)
    got = maxmin_select((x + 2.0).to(place), 10, start=start, centred=True)
    assert torch.equal(got, want)


def test_identical_rows_have_no_direction(place: torch.device) -> None:
    """Centred copies are rounding noise: all alike, so the lowest rows win."""
    x = torch.randn(1, 64).repeat(9, 1)
    start = torch.tensor([0], device=place)
    assert maxmin_select(x.to(place), 3, centred=True, start=start).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 11}, r"k must be in \[0, 10\]"),
        ({"k": [2, 2]}, "2 values of k for 1 spans"),
        ({"spans": 3}, "spans"),
        ({"weights": torch.ones(9)}, "weights must be"),
        ({"weights": -torch.ones(10)}, "at least 0"),
        ({"weights": torch.full((10,), math.nan)}, "at least 0"),
        ({"start": torch.tensor([10])}, "inside its span"),
        ({"start": torch.tensor([0, 1])}, "start must be"),
        ({"start": torch.tensor([0.0])}, "int32 or int64"),
        ({"x": torch.full((10, 4), math.nan)}, "NaN or infinite"),
        ({"x": torch.full((10, 4), math.inf)}, "NaN or infinite"),
        ({"weights": torch.ones(10, device="meta")}, "one device"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.randn(10, 4), "k": 3, **change}
    with pytest.raises(KernelError, match=message):
        maxmin_select(**arguments)  # type: ignore[arg-type]
