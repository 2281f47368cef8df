"""What holds for every op: Triton equals plain PyTorch, graphs, strides, NaN, refused arguments.

The cases are those of `tokencomp.kernels.cases`. They are what plain pytest runs of the Triton
kernels.
"""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tokencomp import kernels
from tokencomp.kernels import KernelError
from tokencomp.kernels.cases import CASES, leaves, merged, op_of

every_case = pytest.mark.parametrize("name", CASES)
# One case per op.
every_op = pytest.mark.parametrize("name", [name for name in CASES if "," not in name])


@every_case
def test_triton_equals_pytorch(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    case, op = CASES[name], op_of(name)
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
