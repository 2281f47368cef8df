"""Inputs that every op must accept (any strides) or refuse (mixed devices, sizes past 32 bits)."""

import math
from collections.abc import Callable

import pytest
import torch
from tokencomp.kernels import KernelError
from torch import Tensor

from tokencomp import kernels

ROWS = torch.arange(0, 12, 2)
# Shape of the main operand, and a call that puts every index on the device of that operand.
CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]] = {
    "attention_colsum": ((1, 2, 7, 16), lambda x: kernels.attention_colsum(x[:, :, :3], x)),
    "bipartite_match": ((12, 20), lambda x: kernels.bipartite_match(x, 6)),
    "ccam_attention": ((1, 2, 6, 16), lambda x: kernels.ccam_attention(x, x, x, 3)),
    "frame_pool": ((2, 4, 4, 20), lambda x: kernels.frame_pool(x, [(2, 2), (3, 4)])),
    "gather_rows": (
        (2, 12, 20),
        lambda x: kernels.gather_rows([x], ROWS.to(x.device).expand(2, -1)),
    ),
    "maxmin_select": ((12, 20), lambda x: kernels.maxmin_select(x, 4, spans=6)),
    "merge_rows": (
        (12, 20),
        lambda x: kernels.merge_rows(
            x, torch.arange(12, device=x.device) // 2 * 2, ROWS.to(x.device)
        ),
    ),
    "nearest_previous_frame": ((3, 2, 2, 20), lambda x: kernels.nearest_previous_frame(x)),
    "topk_stable": ((3, 20), lambda x: kernels.topk_stable(x[0], 5)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", CALLS)
def test_any_strides(op: str, layout: str, place: torch.device) -> None:
    shape, call = CALLS[op]
    x = torch.randn(shape).to(place)
    view = LAYOUTS[layout](x)
    assert torch.equal(view, x) and not view.is_contiguous()
    got, want = (torch.utils._pytree.tree_leaves(call(v)) for v in (view, x))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


X = torch.randn(4, 8)
INDEX = torch.arange(4)
HEADS = torch.randn(1, 2, 4, 8)
ELSEWHERE: dict[str, Callable[[torch.device], object]] = {
    "colsum keys": lambda d: kernels.attention_colsum(HEADS, HEADS.to(d)),
    "colsum row_weights": lambda d: kernels.attention_colsum(HEADS, HEADS, X[:, 0].to(d)),
    "colsum visible": lambda d: kernels.attention_colsum(
        HEADS, HEADS, visible=INDEX.expand(3, 1, 4).int().to(d)
    ),
    "ccam keys": lambda d: kernels.ccam_attention(HEADS, HEADS.to(d), HEADS, 2),
    "gather index": lambda d: kernels.gather_rows([X[None]], INDEX[None].to(d)),
    "gather tensors": lambda d: kernels.gather_rows([X[None], X[None].to(d)], INDEX[None]),
    "maxmin weights": lambda d: kernels.maxmin_select(X, 2, X[:, 0].abs().to(d)),
    "maxmin margin": lambda d: kernels.maxmin_select(X, 2, margin=X[:1, 0].abs().to(d)),
    "maxmin start": lambda d: kernels.maxmin_select(X, 2, start=INDEX[:1].to(d)),
    "merge target": lambda d: kernels.merge_rows(X, INDEX.to(d), INDEX),
    "merge keep": lambda d: kernels.merge_rows(X, INDEX, INDEX.to(d)),
    "merge sizes": lambda d: kernels.merge_rows(X, INDEX, INDEX, torch.ones(4, device=d)),
}


@pytest.mark.parametrize("call", ELSEWHERE)
def test_mixed_devices(call: str) -> None:
    with pytest.raises(KernelError, match=r"one device; got .* on meta"):
        ELSEWHERE[call](torch.device("meta"))


def test_mixed_dtypes() -> None:
    with pytest.raises(KernelError, match="one dtype"):
        kernels.attention_colsum(HEADS, HEADS.bfloat16())
    with pytest.raises(KernelError, match="one dtype"):
        kernels.ccam_attention(HEADS, HEADS, HEADS.half(), 2)
    for index in (INDEX.float(), INDEX.short()):
        with pytest.raises(KernelError, match="int32 or int64"):
            kernels.merge_rows(X, index, INDEX)
        with pytest.raises(KernelError, match="int32 or int64"):
            kernels.gather_rows([X[None]], index[None])


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has any size but stores a single element."""
    return torch.zeros((), dtype=dtype).expand(shape)


MANY = 2**31
HUGE: dict[str, Callable[[], object]] = {
    "colsum keys": lambda: kernels.attention_colsum(huge(1, 1, 1, 1), huge(1, 1, MANY, 1)),
    "colsum heads x rows": lambda: kernels.attention_colsum(
        huge(1, 2**11, 2**20, 1), huge(1, 1, 2**20, 1)
    ),
    "match": lambda: kernels.bipartite_match(huge(MANY, 1)),
    "ccam keys": lambda: kernels.ccam_attention(
        huge(1, 1, 1, 1), huge(1, 1, MANY, 1), huge(1, 1, MANY, 1), 2
    ),
    "ccam queries x frames": lambda: kernels.ccam_attention(
        huge(1, 1, 2**20, 1), huge(1, 1, 2**11, 1), huge(1, 1, 2**11, 1), 2**11
    ),
    "pool": lambda: kernels.frame_pool(huge(1, 2**16, 2**15, 1), [(1, 1)]),
    "gather": lambda: kernels.gather_rows([huge(1, MANY, 1)], INDEX[None]),
    "gather rows x heads": lambda: kernels.gather_rows(
        [huge(1, 2**11, 1, 1)], huge(1, 2**20, dtype=torch.int64), 2
    ),
    "maxmin": lambda: kernels.maxmin_select(huge(MANY, 1), 1),
    "merge": lambda: kernels.merge_rows(huge(MANY, 1), INDEX, INDEX),
    "nearest": lambda: kernels.nearest_previous_frame(huge(MANY, 1, 1, 1)),
}


@pytest.mark.parametrize("call", HUGE)
def test_sizes_past_32_bits(call: str) -> None:
    """The error is raised before any element is read or any memory is allocated."""
    with pytest.raises(KernelError, match="32-bit"):
        HUGE[call]()


def test_nan_key_reaches_every_row_that_sees_it(place: torch.device) -> None:
    """All columns that such a row sees become NaN, and what such a row reads."""
    q, k = torch.randn(2, 1, 2, 6, 16).to(place).unbind(0)
    k[:, :, 4] = math.nan
    assert kernels.attention_colsum(q, k).isnan().all()
    assert kernels.ccam_attention(q, k, k, 3)[:, :, 4:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("op", CALLS)
def test_nan_input_gives_an_error_or_nan(op: str, bad: float, place: torch.device) -> None:
    """The op raises an error, or its result is not finite.

    Infinity may remain where values are only moved or ranked.
    """
    shape, call = CALLS[op]
    x = torch.randn(shape)
    x.view(-1)[0] = bad
    try:
        result = call(x.to(place))
    except KernelError as error:
        assert "NaN" in str(error)
    else:
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]
        assert op == "topk_stable" or any(not t.isfinite().all() for t in leaves)
