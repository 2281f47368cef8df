"""maxmin_select in long spans: the result is exact, and rounds save most of the distances."""

import functools

import pytest
import torch
from support.max_min import check_greedy
from tokencomp.kernels import maxmin_select
from tokencomp.kernels.maxmin_select import naive
from tokencomp.kernels.maxmin_select import rounds as module
from torch.utils._python_dispatch import TorchDispatchMode

ordered_choices = functools.partial(maxmin_select, ordered=True)


@pytest.mark.parametrize(("margin", "weighted"), [(0.0, False), (0.2, True)])
def test_long_spans_choose_in_rounds(
    place: torch.device, margin: float, weighted: bool, short_rounds: None
) -> None:
    """With noisy copies of a scene, one choice makes most of the best rows useless."""
    x = torch.randn(11, 40).repeat(10, 1) + 0.05 * torch.randn(110, 40)
    x = torch.cat([x, torch.randn(40, 40)])
    weights = torch.rand(150) if weighted else None
    place_weights = None if weights is None else weights.to(place)
    got = ordered_choices(
        x.to(place), [60, 9], place_weights, spans=[110, 40],
        margin=torch.tensor([margin, 0.0], device=place) if margin else None,
    ).cpu()  # fmt: skip
    part = None if weights is None else weights[:110]
    check_greedy(x[:110], got[:60].tolist(), part, 1e-6, margin)
    part = None if weights is None else weights[110:]
    check_greedy(x[110:], (got[60:] - 110).tolist(), part, 1e-6)


def test_long_spans_anywhere(place: torch.device, short_rounds: None) -> None:
    """Rows are counted from the start of `x`, and a span with k = 0 is skipped."""
    lengths, counts = [110, 30, 90], [6, 0, 11]
    x, weights, margin = torch.randn(sum(lengths), 24), torch.rand(sum(lengths)), torch.rand(3)
    got = ordered_choices(
        x.to(place), counts, weights.to(place), spans=lengths,
        margin=margin[: len(lengths)].to(place),
    ).cpu()  # fmt: skip
    start = 0
    for length, m, picks in zip(lengths, margin.tolist(), got.split(counts), strict=False):
        span = slice(start, start + length)
        if len(picks):
            assert picks[0] - start == weights[span].argmax()
        check_greedy(x[span], (picks - start).tolist(), weights[span], 1e-5, m)
        start += length


class Products(TorchDispatchMode):
    """Count the multiplications of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "mv"):
            self.count += args[0].numel() * (args[1].shape[-1] if args[1].dim() > 1 else 1)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of choices in every round of the plain version."""
    original, counts = module._round, []

    def spy(*arguments: object) -> list[int]:
        picks = original(*arguments)
        counts.append(len(picks))
        return picks

    monkeypatch.setattr(module, "_round", spy)
    return counts


@pytest.mark.parametrize(("noise", "weighted"), [(0.0, False), (0.05, True), (30.0, False)])
def test_most_cosines_are_never_needed(weighted: bool, noise: float, rounds: list[int]) -> None:
    """In still and moving scenes at most half of the cosines with other rows are computed.

    The cosines between the candidates of a round are not counted.
    """
    x = torch.randn(64, 32).repeat(32, 1) + noise * torch.randn(2048, 32)
    weights = torch.rand(64).repeat(32) if weighted else None
    with Products() as products:
        naive.maxmin_select(x, [700], weights, [2048], torch.tensor([0.1]), None)
    cosines = products.count / 32 - 2048  # one row for the distance to the mean
    assert cosines - len(rounds) * module.ROUND**2 <= 700 * 2048 / 2
    assert len(rounds) <= 700 / 20


def test_choices_of_a_round_in_a_still_video(
    rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the 2048 candidates of the Triton version, a round makes at least 60 choices.

    The roofline estimate of the Triton version assumes this number.
    """
    monkeypatch.setattr(module, "ROUND", 2048)
    x = torch.randn(256, 128).repeat(64, 1) + 0.02 * torch.randn(16384, 128)
    weights = torch.rand(256).repeat(64) * (1 + 0.02 * torch.rand(16384))
    naive.maxmin_select(x, [819], weights, [16384], torch.tensor([0.1]), None)
    assert sum(rounds) == 818 and 819 / len(rounds) >= 60
