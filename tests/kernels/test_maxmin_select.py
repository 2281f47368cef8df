"""Every choice of maxmin_select is the best remaining one by a dense fp64 distance matrix."""

import importlib
import math

import pytest
import torch
from tokencomp.kernels import KernelError, maxmin_select, mean_distance
from tokencomp.kernels.maxmin_select import naive
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = 1e-5  # rows whose distance is smaller count as copies, as the docstring says


def distances(x: Tensor, centred: bool = False) -> Tensor:
    """Distances 1 - cos of all pairs of rows in fp64, ``(n, n)``."""
    x = x.double()
    if centred:
        x = x - x.mean(0)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > 0, x / norm, 0.0)
    return (1 - x @ x.T).clamp(min=COPIES)


def by_hand(x: Tensor, weights: Tensor, k: int, start: int, margin: float = 0.0) -> list[int]:
    """Apply the rule in plain loops; ties go to the lower row."""
    distance, weights, order = distances(x).tolist(), weights.tolist(), [start]
    while len(order) < k:
        remaining = [i for i in range(len(x)) if i not in order]
        score = {i: weights[i] * (margin + min(distance[i][j] for j in order)) for i in remaining}
        order.append(max(remaining, key=score.__getitem__))
    return order


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat spans above 64 rows as long ones, with rounds of 8 candidates."""
    monkeypatch.setattr(naive, "MAX_GRAM_ROWS", 64)
    monkeypatch.setattr(naive, "ROUND", 8)
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.maxmin_select.triton")
        monkeypatch.setattr(triton, "MAX_GRAM_ROWS", 64)
        monkeypatch.setattr(triton, "CANDIDATES", 8)


def check_greedy(
    x: Tensor, order: list[int], weights: Tensor | None, centred: bool, tolerance: float,
    margin: float = 0.0, distance: Tensor | None = None,
) -> None:  # fmt: skip
    """Each choice after the first has the best remaining score, up to rounding."""
    assert len(set(order)) == len(order)
    distance = distances(x, centred) if distance is None else distance
    weights = torch.ones(len(x)) if weights is None else weights
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64)
    for step, choice in enumerate(order[1:], start=1):
        nearest = torch.minimum(nearest, distance[order[step - 1]])
        score = (nearest + margin) * weights.double()
        score[order[:step]] = -1.0
        assert score[choice] >= score.max() - tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("margins", [False, True])
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
    margins: bool, centred: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    x = (torch.randn(sum(lengths), dim) + 0.3).to(dtype)
    weights = torch.rand(len(x)) if weighted else None
    margin = torch.rand(len(lengths)) if margins else torch.zeros(len(lengths))
    got = maxmin_select(
        x.to(place), counts, None if weights is None else weights.to(place), spans=lengths,
        centred=centred, ascending=False, margin=margin.to(place) if margins else None,
    ).cpu()  # fmt: skip
    start = 0
    for rows, picks, m in zip(x.split(lengths), got.split(counts), margin.tolist(), strict=True):
        order = (picks - start).tolist()
        if not order:
            start += len(rows)
            continue
        part = None if weights is None else weights[start : start + len(rows)]
        mean = rows.double().mean(0)
        far = 1 - torch.nn.functional.cosine_similarity(rows.double(), mean[None])
        first = far if part is None else part.double()
        assert first[order[0]] >= first.max() - 1e-6
        # The Triton path stores centred rows of 16-bit inputs in fp16.
        check_greedy(rows, order, part, centred, 1e-5 if dtype == torch.float32 else 1e-3, m)
        start += len(rows)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_long_spans_choose_in_rounds(
    place: torch.device, margin: float, weighted: bool, centred: bool, short_rounds: None
) -> None:
    """With noisy copies of a scene, one choice makes most of the best rows useless."""
    x = torch.randn(11, 40).repeat(10, 1) + 0.05 * torch.randn(110, 40)
    x = torch.cat([x, torch.randn(40, 40)])
    weights = torch.rand(150) if weighted else None
    place_weights = None if weights is None else weights.to(place)
    got = maxmin_select(
        x.to(place), [60, 9], place_weights, spans=[110, 40], centred=centred, ascending=False,
        margin=torch.tensor([margin, 0.0], device=place) if margin else None,
    ).cpu()  # fmt: skip
    part = None if weights is None else weights[:110]
    check_greedy(x[:110], got[:60].tolist(), part, centred, 1e-6, margin)
    part = None if weights is None else weights[110:]
    check_greedy(x[110:], (got[60:] - 110).tolist(), part, centred, 1e-6)


@pytest.mark.parametrize(
    ("lengths", "counts"), [([40, 110], [3, 9]), ([110, 30, 90], [6, 0, 11]), ([110, 90], [0, 5])],
    ids=str,
)  # fmt: skip
def test_long_spans_anywhere(
    place: torch.device, lengths: list[int], counts: list[int], short_rounds: None
) -> None:
    """Rows are counted from the start of `x`, and a span with k = 0 is skipped."""
    x, weights, margin = torch.randn(sum(lengths), 24), torch.rand(sum(lengths)), torch.rand(3)
    got = maxmin_select(
        x.to(place), counts, weights.to(place), spans=lengths, ascending=False,
        margin=margin[: len(lengths)].to(place),
    ).cpu()  # fmt: skip
    start = 0
    for length, m, picks in zip(lengths, margin.tolist(), got.split(counts), strict=False):
        span = slice(start, start + length)
        if len(picks):
            assert picks[0] - start == weights[span].argmax()
        check_greedy(x[span], (picks - start).tolist(), weights[span], False, 1e-5, m)
        start += length


def differences(x: Tensor) -> Tensor:
    """Root mean squares of the differences of all pairs of rows in fp64, ``(n, n)``."""
    x = x.double()
    return (x[:, None] - x[None]).square().mean(2).sqrt().clamp(min=COPIES)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("lengths", "counts", "dim", "rounds", "dtype"),
    [
        ([1], [1], 5, False, torch.float32),
        ([34, 0, 3, 17], [33, 0, 3, 12], 7, False, torch.bfloat16),
        ([20, 66], [0, 30], 5, True, torch.float32),
    ],
    ids=["one row", "at once", "in rounds"],
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
    got = maxmin_select(
        x.to(place), counts, None if weights is None else weights.to(place), spans=lengths,
        ascending=False, metric="rms", margin=None if margin is None else margin.to(place),
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
            rows, order, part, False, 1e-6, 0.0 if margin is None else float(margin[s]),
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
    got = maxmin_select(
        x.to(place), 1, spans=lengths, start="isolated", metric=metric, ascending=False
    ).tolist()
    start = 0
    for part, pick in zip(x.split(lengths), got, strict=True):
        distance = differences(part) if metric == "rms" else distances(part)
        nearest = distance.fill_diagonal_(math.inf).amin(1)
        assert nearest[pick - start] >= nearest.max() - 1e-5
        start += len(part)


@pytest.mark.parametrize("place_of_start", [0, 4])
def test_root_mean_square_sees_lengths(place: torch.device, place_of_start: int) -> None:
    """Rows of one direction differ in length alone; the cosine takes all of them for copies."""
    x = torch.tensor([0.0, 1.0, 4.0, 6.0, 10.0])[:, None].expand(5, 3)
    start = torch.tensor([place_of_start], device=place)
    got = maxmin_select(x.to(place), 4, start=start, ascending=False, metric="rms").tolist()
    assert got == ([0, 4, 2, 3] if place_of_start == 0 else [4, 0, 2, 3])


@pytest.mark.parametrize("rounds", [False, True], ids=["at once", "in rounds"])
@pytest.mark.parametrize("k", [90, 100])
@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_ties_everywhere(
    place: torch.device, margin: float, k: int, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """One-hot rows have exact cosines, and weights of powers of two exact scores."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = torch.eye(20)[torch.randint(20, (100,))]
    weights = 0.5 ** torch.randint(4, (100,)).float()
    margins = torch.tensor([margin], device=place)
    got = maxmin_select(x.to(place), k, weights.to(place), margin=margins, ascending=False)
    assert got.tolist() == by_hand(x, weights, k, int(weights.argmax()), margin)


@pytest.mark.parametrize("rounds", [False, True], ids=["at once", "in rounds"])
@pytest.mark.parametrize("weighted", [False, True])
def test_copies_go_by_weight_then_by_row(
    place: torch.device, weighted: bool, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """The cosine of two copies differs from 1 by rounding, which must not rank copies."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = torch.randn(7, 300).repeat(15, 1)
    weights = torch.rand(105) if weighted else torch.ones(105)
    start = weights.argmax()[None]
    got = maxmin_select(
        x.to(place), 70, weights.to(place), start=start.to(place), ascending=False
    ).tolist()
    assert len({i % 7 for i in got[:7]}) == 7
    check_greedy(x, got[:7], weights, False, 1e-6)
    remaining = [i for i in range(105) if i not in got[:7]]
    assert got[7:] == sorted(remaining, key=lambda i: (-weights[i], i))[:63]


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
    original, counts = naive._round, []

    def spy(*arguments: object) -> list[int]:
        picks = original(*arguments)
        counts.append(len(picks))
        return picks

    monkeypatch.setattr(naive, "_round", spy)
    return counts


@pytest.mark.parametrize("noise", [0.0, 0.05, 30.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_most_cosines_are_never_needed(weighted: bool, noise: float, rounds: list[int]) -> None:
    """In still and moving scenes at most half of the cosines with other rows are computed.

    The cosines between the candidates of a round are not counted.
    """
    x = torch.randn(64, 32).repeat(32, 1) + noise * torch.randn(2048, 32)
    weights = torch.rand(64).repeat(32) if weighted else None
    with Products() as products:
        naive.maxmin_select(x, [700], weights, [2048], False, torch.tensor([0.1]), None)
    cosines = products.count / 32 - 2048  # one row for the distance to the mean
    assert cosines - len(rounds) * naive.ROUND**2 <= 700 * 2048 / 2
    assert len(rounds) <= 700 / 20


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_choices_of_a_round_in_a_still_video(
    weighted: bool, margin: float, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the 2048 candidates of the Triton version, a round makes at least 60 choices.

    The roofline estimate of the Triton version assumes this number.
    """
    monkeypatch.setattr(naive, "ROUND", 2048)
    x = torch.randn(256, 128).repeat(64, 1) + 0.02 * torch.randn(16384, 128)
    weights = torch.rand(256).repeat(64) * (1 + 0.02 * torch.rand(16384)) if weighted else None
    naive.maxmin_select(x, [819], weights, [16384], False, torch.tensor([margin]), None)
    assert sum(rounds) == 818 and 819 / len(rounds) >= 60


@pytest.mark.parametrize("margin", [None, 0.2])
def test_a_round_chooses_many_rows(
    device: torch.device, margin: float | None, monkeypatch: pytest.MonkeyPatch, short_rounds: None
) -> None:
    """The Triton version reads all rows once per round instead of once per choice."""
    triton = pytest.importorskip("tokencomp.kernels.maxmin_select.triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    monkeypatch.setattr(triton, "CANDIDATES", 32)
    original, chosen = triton.Cosines.closest, []

    def spy(rows: object, new: Tensor, nearest: Tensor) -> None:
        chosen.append(len(new))
        original(rows, new, nearest)

    monkeypatch.setattr(triton.Cosines, "closest", spy)
    x = torch.randn(40, 16).repeat(5, 1) + 0.05 * torch.randn(200, 16)
    margins = None if margin is None else torch.tensor([margin], device=device)
    maxmin_select(x.to(device), 60, torch.rand(200).to(device), margin=margins)
    assert sum(chosen) == 60 and len(chosen) <= 15


def test_spans_in_several_groups(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(90, 16, device=place)
    weights, margin = torch.rand(90, device=place), torch.rand(3, device=place)
    parts = [(i, slice(30 * i, 30 * i + 30)) for i in range(3)]
    want = torch.cat(
        [maxmin_select(x[s], 5, weights[s], margin=margin[i : i + 1]) + 30 * i for i, s in parts]
    )
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.maxmin_select.triton")
        monkeypatch.setattr(triton, "GRAM_ELEMENTS", 2000)
    assert torch.equal(maxmin_select(x, 5, weights, spans=30, margin=margin), want)


def test_start_ties_and_duplicates(place: torch.device) -> None:
    x = torch.eye(4).repeat(2, 1)  # rows 4..7 repeat rows 0..3
    start = torch.tensor([6], device=place)
    got = maxmin_select(x.to(place), 8, start=start, ascending=False)
    # Ties go to the lower row. Once every direction is chosen, only copies remain.
    assert got.tolist() == [6, 0, 1, 3, 2, 4, 5, 7]
    assert maxmin_select(x.to(place), 4, start=start).tolist() == [0, 1, 3, 6]


def test_strided_weights_margins_and_starts(place: torch.device) -> None:
    """Strided views and expanded values give the result of contiguous copies."""
    x, weights = torch.randn(40, 12, device=place), torch.rand(80, device=place)[::2]
    margin = torch.tensor(0.3, device=place).expand(2)
    start = torch.tensor([[3, 0], [7, 0]], device=place)[:, 0]
    options = {"spans": [20, 20], "ascending": False}
    got = maxmin_select(x, 6, weights, margin=margin, start=start, **options)
    solid = {"margin": margin.clone(), "start": start.clone()}
    assert got.tolist() == maxmin_select(x, 6, weights.clone(), **solid, **options).tolist()
    check_greedy(x[:20].cpu(), got[:6].tolist(), weights[:20].cpu(), False, 1e-5, 0.3)


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
    margin = torch.tensor([0.5], device=place)
    assert maxmin_select(x, 10, weights, margin=margin).tolist() == list(range(10, 20))


def test_centring_ignores_a_common_offset(place: torch.device) -> None:
    x = torch.randn(40, 16)
    start = torch.tensor([0], device=place)
    want = maxmin_select(x.to(place), 10, start=start, centred=True)
    got = maxmin_select((x + 2.0).to(place), 10, start=start, centred=True)
    assert torch.equal(got, want)


def test_identical_rows_have_no_direction(place: torch.device) -> None:
    """Centred copies consist of rounding, so they tie and the lowest rows are chosen."""
    x = torch.randn(1, 64).repeat(9, 1)
    start = torch.tensor([0], device=place)
    assert maxmin_select(x.to(place), 3, centred=True, start=start).tolist() == [0, 1, 2]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["offset", "zero rows", "few rows", "flat", "copies", "large"])
def test_mean_distance(
    kind: str, dtype: torch.dtype, centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean equals that over all pairs of rows, computed one by one."""
    x = torch.randn({"few rows": 2}.get(kind, 50), 33) + (3.0 if kind == "offset" else 0.5)
    if kind == "zero rows":
        x[::3] = 0.0
    elif kind in ("flat", "copies"):
        x[:] = x[0]
        x[1] += 1.0 if kind == "flat" else 0.0
    x = (x * (200 if kind == "large" else 1)).to(dtype)
    wide = x.double()
    offset = wide - wide.mean(0) if centred else wide
    square, threshold = wide.square().sum(1), 1e-5 if centred else 0.0
    unit = [
        row / row.norm() if row.square().sum() > threshold * s and row.norm() else row * 0
        for row, s in zip(offset, square, strict=True)
    ]
    expected = sum(1 - a @ b for a in unit for b in unit) / len(unit) ** 2
    for block in (1 << 24, 100):
        monkeypatch.setattr(naive, "GRAM_ELEMENTS", block)
        got = mean_distance(x, centred)
        assert got.shape == (1,) and got.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(float(got) - float(expected)) < 1e-5


@pytest.mark.parametrize("centred", [False, True])
def test_mean_distance_of_spans(place: torch.device, centred: bool) -> None:
    """Every span has the mean of its own pairs, whatever stands beside it."""
    lengths = [33, 1, 40, 33]
    x = torch.randn(sum(lengths), 70) + 0.3
    got = mean_distance(x.to(place), centred, spans=lengths).cpu()
    alone = torch.cat([mean_distance(part.to(place), centred).cpu() for part in x.split(lengths)])
    assert torch.equal(got, alone)
    expected = [distances(part, centred).clamp(min=0).mean() for part in x.split(lengths)]
    assert torch.allclose(got.double()[[0, 2, 3]], torch.stack(expected)[[0, 2, 3]], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 11}, r"k must be in \[0, 10\]"),
        ({"k": [2, 2]}, "2 values of k for 1 spans"),
        ({"spans": 3}, "spans"),
        ({"weights": torch.ones(9)}, "weights must be"),
        ({"weights": -torch.ones(10)}, "weights and margins must be finite and at least 0"),
        ({"weights": torch.full((10,), math.nan)}, "at least 0"),
        ({"margin": torch.tensor([-0.1])}, "margins must be finite and at least 0"),
        ({"margin": torch.tensor([math.inf])}, "margins must be finite and at least 0"),
        ({"margin": torch.tensor([-0.1]), "weights": torch.ones(10)}, "margins must be finite"),
        ({"margin": torch.zeros(2)}, r"margin must be \(1,\)"),
        ({"margin": torch.zeros(1, device="meta")}, "one device"),
        ({"metric": "l1"}, "metric='l1' is not known; allowed: cosine, rms"),
        ({"start": "first"}, "start='first' is not known; allowed: isolated"),
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
