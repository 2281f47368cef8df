"""What holds for every op: Triton equals plain PyTorch, graphs, strides, NaN, refused arguments.

Each case is a small one whose rows, features and keys end inside of a tile, with ties where the op
ranks. It is what plain pytest runs of the Triton kernels.
"""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tokencomp import kernels
from tokencomp.kernels import KernelError


class Case(NamedTuple):
    """Shape of the main operand `x`, and a call that puts all others on the device of `x`."""

    shape: tuple[int, ...]
    call: Callable[[Tensor], object]
    limits: tuple[tuple[str, int], ...] = ()
    """What to lower in the op's Triton module, so that a small input takes the long path."""


def visible(x: Tensor, rows: int, window: int) -> Tensor:
    """What the last rows of two left-padded samples see, those first that are in the middle.

    One is a padding row.
    """
    begin, keys = torch.tensor([[0], [9]]), x.shape[2]
    own = (torch.arange(rows) + torch.tensor([[21], [48]])) % rows + keys - rows
    low = torch.maximum(own - window + 1, begin)
    own[0, 3], low[0, 3] = -1, 0
    return torch.stack([low, own + 1, own]).int().to(x.device)


def colsum(x: Tensor, rows: int, window: int = 300, **options: object) -> Tensor:
    """Two query heads of different content for every key head."""
    q = torch.cat([x, 2 * x.flip(1)], 1)[:, :, -rows:]
    how = {"row_weights": torch.arange(1.0, rows + 1, device=x.device), "heads": "none"}
    seen = visible(x, rows, window)
    return kernels.attention_colsum(q, x, visible=seen, **{**how, **options})


def layer(x: Tensor) -> object:
    """Tensors of a layer, among them masks, positions, strided, wide and sequence-first ones."""
    index = torch.tensor([[0, 3, -1, 11], [5, 5, 2, -1]], device=x.device)
    heads = x.view(2, 12, 2, 10).transpose(1, 2)
    tensors = [x, x > 0, (9 * x).int(), x[:1], x.bfloat16(), heads, torch.stack([heads, -heads])]
    tensors += [x.transpose(0, 1), x[..., 0], torch.cat([x] * 8, 2)]
    seqs, batches = [1, -2, 1, 1, 1, -2, 3, 0, 1, 1], [0, -3, 0, 0, 0, 0, 1, 1, 0, 0]
    return kernels.gather_rows(tensors, index, seqs, batches)


def merged(x: Tensor, **options: object) -> object:
    """Rows merge into the next multiple of 7 below, and every fifth of the others is dropped."""
    row = torch.arange(len(x), device=x.device)
    target = torch.where((row % 5 == 1) & (row % 7 != 0), -1, row // 7 * 7)
    return kernels.merge_rows(x, target, row[::7], 1 + row % 3, **options)


def match(x: Tensor) -> object:
    """Odd rows 1 and 139, farther apart than a tile of odd rows, are equal and next to row 0."""
    x = torch.cat([x[:1], x[:1] * 0.5, x[2:139], x[:1] * 0.5, x[140:]])
    return kernels.bipartite_match(x, [141, 0, 7])


def maxmin(x: Tensor, **options: object) -> Tensor:
    """Half of the first rows are those before them, but for their lengths or rounding."""
    copies = x[:36] * (1 + 3e-7 if options.get("metric") == "rms" else 3)
    x = torch.cat([x[:36], copies, x[72:]])
    weights = 1 + torch.arange(len(x), device=x.device) % 3
    how = {"spans": [72, 1, 40], "weights": weights, "ordered": True, **options}
    return kernels.maxmin_select(x, [60, 1, 9], **how)


def given(x: Tensor, number: int, **options: object) -> Tensor:
    """Margins, bonuses and several first choices in the first span."""
    start = torch.arange(70, device=x.device) * 25 % 71
    start[60:] = 0
    some = torch.tensor([number, 1, 1], device=x.device)
    how = {"start": start, "given": some, "margin": x[:3, 0].abs(), "bonus": x[:, 1].abs()}
    return maxmin(x, **{**how, **options})


def ties(x: Tensor) -> Tensor:
    """Eleven rows of each of five directions, so that the candidates of a round have one alone."""
    eye = torch.eye(6, device=x.device)
    rows, start = torch.cat([eye[:1], eye[1:].repeat_interleave(11, 0)]), x[:1, 0].int() * 0
    return kernels.maxmin_select(rows, 20, start=start, ordered=True)


def unit(x: Tensor) -> Tensor:
    """Unit rows; three of them are copies of others."""
    x = x / x.norm(dim=1, keepdim=True)
    return torch.cat([x[:3], x[:3], x[6:]])


def covered(x: Tensor) -> Tensor:
    """Coverings of other points by a softmax."""
    x, points, lengths, reach = unit(x), 3 * x[:33], [40, 0, 13], [26, 0, 7]
    logits = [p @ u.T for p, u in zip(points.split(reach), x.split(lengths), strict=True)]
    offset = torch.cat([part.logsumexp(1) for part in logits if len(part)])
    how = {"points": points, "point_spans": reach, "offset": offset}
    return kernels.facility_select(x, [9, 0, 6], spans=lengths, **how)


def facility(x: Tensor) -> Tensor:
    """The last span has five rows four times, but for rounding, and more choices."""
    x, w = unit(x), x[:, 0].abs()
    x, w = (torch.cat([t[:33], t[33:38].repeat(4, *[1] * (t.dim() - 1))]) for t in (x, w))
    x = x * (1 + 2e-7 * (torch.arange(53, device=x.device) * 7 % 4))[:, None]
    return kernels.facility_select(x, [12, 0, 9], w, spans=[33, 0, 20])


def dpp(x: Tensor) -> Tensor:
    """More rows than directions; copies have one relevance."""
    x = unit(x)
    return kernels.dpp_select(x, [12, 0, 3], 1.1 + x[:, 0], spans=[33, 0, 20])


CASES = {
    "attention_colsum": Case(
        (1, 2, 9, 24),
        lambda x: kernels.attention_colsum(x[:, :, :5], x, x[:, :, :5, 0], heads="rms"),
    ),
    "attention_colsum, padded": Case((2, 2, 265, 40), lambda x: colsum(x, 19)),
    "attention_colsum, many rows": Case(
        (2, 2, 90, 40), lambda x: colsum(x, 70, 10, heads="mean"), (("MANY_ROWS", 32),)
    ),
    "attention_colsum, iterated": Case((2, 1, 40, 20), lambda x: colsum(x, 40, iterations=2)),
    "bipartite_match": Case((148, 20), match),
    "ccam_attention": Case(
        (1, 2, 270, 24), lambda x: kernels.ccam_attention(x[:, :, :19], x, x.flip(2), 9)
    ),
    "ccam_attention, free": Case(
        (1, 2, 30, 24), lambda x: kernels.ccam_attention(x, x, x.flip(2), 3, causal=False)
    ),
    "dpp_select": Case((53, 9), dpp),
    "facility_select": Case((53, 9), facility),
    "facility_select, softmax": Case((53, 9), covered),
    "frame_pool": Case(
        (4, 7, 5, 300), lambda x: kernels.frame_pool(x, [(4, 3), (7, 5), (1, 1), (3, 5)])
    ),
    "gather_rows": Case((2, 12, 20), layer),
    "maxmin_select": Case((113, 40), maxmin),
    "maxmin_select, no weights": Case((113, 40), lambda x: maxmin(x, weights=None)),
    "maxmin_select, given": Case((113, 40), lambda x: given(x, 2)),
    "maxmin_select, isolated": Case((113, 40), lambda x: maxmin(x, start="isolated")),
    "maxmin_select, pairs": Case((40, 40), lambda x: kernels.maxmin_select(unit(x), 1, spans=2)),
    "maxmin_select, rms": Case((113, 9), lambda x: maxmin(x, metric="rms", margin=x[:3, 0].abs())),
    "maxmin_select, rounds": Case(
        (113, 40), lambda x: given(x, 40), (("MAX_GRAM_ROWS", 50), ("CANDIDATES", 8))
    ),
    "maxmin_select, rounds of rms": Case(
        (113, 9),
        lambda x: given(x, 40, metric="rms"),
        (("MAX_GRAM_ROWS", 50), ("CANDIDATES", 8)),
    ),
    "maxmin_select, rounds of ties": Case(
        (56, 6), ties, (("MAX_GRAM_ROWS", 50), ("CANDIDATES", 8))
    ),
    "mean_distance": Case((53, 70), lambda x: kernels.mean_distance(x + 0.3, spans=[33, 0, 20])),
    "merge_rows": Case((60, 80), lambda x: merged(x, frames=[42, 0, 18])),
    "merge_rows, sorted": Case((60, 80), lambda x: merged(x, weighted=False), (("MAX_SCAN", 9),)),
    "nearest_previous_frame": Case((3, 5, 4, 70), kernels.nearest_previous_frame),
    "topk_stable": Case(
        (1100, 1),
        lambda x: kernels.topk_stable((2 * x[:, 0]).round(), [3, 0, 200], spans=[40, 0, 1060]),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
# One case per op.
every_op = pytest.mark.parametrize("name", [name for name in CASES if "," not in name])


def leaves(result: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]


@every_case
def test_triton_equals_pytorch(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    case, op = CASES[name], name.split(",")[0]
    x = torch.randn(case.shape)
    monkeypatch.setenv("TOKENCOMP_KERNELS", "naive")
    want = leaves(case.call(x))
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    module = importlib.import_module(f"tokencomp.kernels.{op}.triton")
    for limit, value in case.limits:
        monkeypatch.setattr(module, limit, value)
    got = leaves(case.call(x.to(device)))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@every_op
def test_graphs(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without a break, with the values of the eager call; and PyTorch's own checks.

    They look at the schema (no hidden aliasing or mutation) and the fake tensors. Tensors without
    values give the shapes of the result.
    """
    monkeypatch.setenv("TOKENCOMP_KERNELS", "naive")
    torch._dynamo.reset()
    x, call, recorded = torch.randn(CASES[name].shape, device=device), CASES[name].call, []
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(leaves(compiled(x)), leaves(call(x)), strict=True):
        assert torch.equal(a, b)
    package = importlib.import_module(f"tokencomp.kernels.{name}")
    op_of_package = package._op

    def recorder(*arguments: object, **options: bool) -> object:
        recorded.append(arguments)
        return op_of_package(*arguments, **options)

    monkeypatch.setattr(package, "_op", recorder)
    call(x)
    custom = getattr(torch.ops.tokencomp, name).default
    with FakeTensorMode() as mode:
        fake = leaves(call(mode.from_tensor(x)))
    for shapes in (fake, leaves(call(x.to("meta")))):
        for a, b in zip(shapes, leaves(call(x)), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
    torch.library.opcheck(custom, recorded[0], test_utils=("test_schema", "test_faketensor"))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
STRIDED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]] = {
    "attention_colsum": ((1, 2, 7, 16), lambda x: kernels.attention_colsum(x[:, :, :3], x)),
    "bipartite_match": ((12, 20), lambda x: kernels.bipartite_match(x, 6)),
    "ccam_attention": ((1, 2, 6, 16), lambda x: kernels.ccam_attention(x, x, x, 3)),
    "dpp_select": ((12, 20), lambda x: kernels.dpp_select(x, 4, 1 + x[:, 0].abs(), spans=6)),
    "facility_select": ((12, 20), lambda x: kernels.facility_select(x, 4, x[:, 0].abs(), spans=6)),
    "frame_pool": ((2, 4, 4, 20), lambda x: kernels.frame_pool(x, [(2, 2), (3, 4)])),
    "gather_rows": (
        (2, 12, 20),
        lambda x: kernels.gather_rows([x], torch.arange(0, 12, 2, device=x.device).expand(2, -1)),
    ),
    "maxmin_select": (
        (12, 20),
        lambda x: kernels.maxmin_select(x, 4, x[:, 0].abs(), spans=6, margin=x[0, :2].abs()),
    ),
    "merge_rows": ((12, 20), merged),
    "nearest_previous_frame": ((3, 2, 2, 20), kernels.nearest_previous_frame),
    "topk_stable": ((3, 20), lambda x: kernels.topk_stable(x[0], 5)),
}  # fmt: skip


@pytest.mark.parametrize("op", STRIDED)
def test_any_strides(op: str, place: torch.device) -> None:
    shape, call = STRIDED[op]
    x = torch.randn(shape).to(place)
    for name, layout in LAYOUTS.items():
        view = layout(x)
        assert torch.equal(view, x) and not view.is_contiguous()
        for a, b in zip(leaves(call(view)), leaves(call(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("op", STRIDED)
def test_nan_and_infinity_give_an_error_or_remain(op: str, place: torch.device) -> None:
    """Infinity may remain where values are only moved or ranked."""
    shape, call = STRIDED[op]
    for bad in (math.nan, math.inf):
        x = torch.randn(shape)
        x.view(-1)[0] = bad
        try:
            result = call(x.to(place))
        except KernelError as error:
            assert "NaN" in str(error) or "finite" in str(error)
        else:
            finite = all(t.isfinite().all() for t in leaves(result))
            assert op == "topk_stable" or not finite


REFUSED: dict[str, Callable[[], object]] = {
    "more rows than there are": lambda: kernels.topk_stable(torch.zeros(3), 4),
    "spans that leave rows out": lambda: kernels.maxmin_select(torch.randn(10, 4), 3, spans=3),
    "a start in no span": lambda: kernels.maxmin_select(
        torch.randn(10, 4), 3, start=torch.tensor([10])
    ),
    "negative weights": lambda: kernels.facility_select(torch.eye(3), 2, -torch.ones(3)),
    "no relevance": lambda: kernels.dpp_select(torch.eye(3), 2, torch.zeros(3)),
    "a row past the last": lambda: kernels.gather_rows(
        [torch.randn(2, 4, 3)], torch.tensor([[0, 4], [0, 1]])
    ),
    "targets that are not kept": lambda: kernels.merge_rows(
        torch.randn(4, 2), torch.tensor([1, 1, 2, 3]), torch.tensor([1, 3])
    ),
    "a grid larger than the frame": lambda: kernels.frame_pool(torch.randn(1, 4, 4, 8), [(5, 4)]),
    "frames that leave rows out": lambda: kernels.bipartite_match(torch.randn(10, 4), [5, 4]),
    "keys of part of a frame": lambda: kernels.ccam_attention(*torch.randn(3, 1, 1, 4, 8), 3),
    "rows that see no keys of theirs": lambda: kernels.attention_colsum(
        torch.randn(1, 1, 5, 8), torch.randn(1, 1, 3, 8)
    ),
    "keys past the last": lambda: kernels.attention_colsum(
        *torch.ones(2, 1, 1, 3, 8),
        visible=torch.tensor([0, 4, 2]).int().view(3, 1, 1).expand(3, 1, 3),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_would_give_a_wrong_choice(name: str) -> None:
    with pytest.raises(KernelError):
        REFUSED[name]()


NO = torch.zeros(0, dtype=torch.int64)
EMPTY: dict[str, Callable[[torch.device], object]] = {
    "no tensors": lambda at: kernels.gather_rows([], NO.expand(2, 0).to(at)),
    "no places": lambda at: kernels.gather_rows(
        [torch.ones(2, 4, 3).to(at)], NO.expand(2, 0).to(at)
    ),
    "no rows to merge": lambda at: kernels.merge_rows(
        torch.ones(0, 3).to(at), NO.to(at), NO.to(at)
    ),
    "no frames": lambda at: kernels.nearest_previous_frame(torch.zeros(0, 2, 2, 4).to(at)),
    "no rows to match": lambda at: kernels.bipartite_match(torch.ones(0, 4).to(at), []),
    "no spans": lambda at: kernels.topk_stable(torch.zeros(0).to(at), [], spans=[]),
    "spans of no rows": lambda at: kernels.topk_stable(
        torch.zeros(0).to(at), [0] * 3, spans=[0] * 3
    ),
    "no samples": lambda at: kernels.attention_colsum(*torch.ones(2, 0, 2, 4, 16).to(at)),
}


def test_nothing_gives_nothing(place: torch.device) -> None:
    """And what has no source, or sees no keys, is zero."""
    for name, call in EMPTY.items():
        assert all(t.numel() == 0 for t in leaves(call(place))), name
    x = torch.ones(2, 2, 4, 16, device=place)
    zeros = kernels.gather_rows([x], torch.full((2, 3), -1, device=place))
    zeros += [kernels.attention_colsum(x[:, :, :0], x)]
    unseen = torch.zeros(3, 2, 4, dtype=torch.int32, device=place)
    zeros += [kernels.attention_colsum(x, x, visible=unseen)]
    zeros += [kernels.nearest_previous_frame(0 * x)[1]]
    assert all(len(t) and (t == 0).all() for t in zeros)


DIFFERENTIABLE: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "ccam_attention": (
        (3, 1, 1, 6, 4),
        lambda x: kernels.ccam_attention(x[0, :, :, :4], x[1], x[2], 3),
    ),
    "frame_pool": ((2, 4, 3, 2), lambda x: kernels.frame_pool(x, [(4, 3), (2, 2)])),
    "gather_rows": (
        (2, 5, 3),
        lambda x: kernels.gather_rows([x], torch.tensor([[0, 4, -1], [2, 2, 1]]).to(x.device))[0],
    ),
    "merge_rows": ((12, 5), lambda x: merged(x).x),
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradient(op: str, place: torch.device) -> None:
    shape, call = DIFFERENTIABLE[op]
    x = torch.randn(shape, dtype=torch.float64, device=place, requires_grad=True)
    assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize("op", sorted(STRIDED.keys() - DIFFERENTIABLE.keys()))
def test_no_gradient(op: str, place: torch.device) -> None:
    shape, call = STRIDED[op]
    x = torch.randn(shape, device=place)
    for a, b in zip(leaves(call(x.clone().requires_grad_())), leaves(call(x)), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_nan_key_reaches_every_row_that_sees_it(place: torch.device) -> None:
    """All columns that such a row sees become NaN, and what such a row reads."""
    q, k = torch.randn(2, 1, 2, 6, 16).to(place).unbind(0)
    k[:, :, 4] = math.nan
    assert kernels.attention_colsum(q, k).isnan().all()
    assert kernels.ccam_attention(q, k, k, 3)[:, :, 4:].isnan().all()
