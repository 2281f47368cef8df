"""attention_colsum and ccam_attention against dense attention in fp64."""

import math

import pytest
import torch
from tokencomp.kernels.ccam_attention import runs
from torch import Tensor

from tokencomp.kernels import attention_colsum, ccam_attention, visible_frames

# (batch, kv heads, group, rows, keys, head dim), dtype
SHAPES = [
    ((1, 1, 1, 1, 1, 64), torch.float32),
    ((2, 2, 4, 5, 77, 64), torch.bfloat16),
    ((1, 1, 7, 1, 1025, 80), torch.float32),
    ((2, 1, 4, 33, 257, 128), torch.bfloat16),
    ((1, 2, 2, 300, 300, 16), torch.float32),
    ((1, 1, 1, 70, 150, 256), torch.bfloat16),
    ((1, 1, 2, 3, 40, 5), torch.float32),
]


def matrix(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Dense attention ``(B, Hq, R, N)`` in fp64; rows that see no key are 0."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.transpose(-1, -2) * scale
    logits = logits.masked_fill(~visible[:, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def causal_mask(q_index: Tensor, keys: int, start: Tensor, end: Tensor) -> Tensor:
    """Mask ``(B, R, N)`` of columns within the sample's bounds and not after the row's own."""
    column = torch.arange(keys)
    inside = (column >= start[:, None]) & (column < end[:, None])
    return inside[:, None] & (column <= q_index[..., None]) & (q_index >= 0)[..., None]


def visible_rows(index: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What rows at the columns `index` ``(B, R)`` see, as the argument `visible` has it."""
    stop = torch.minimum(index + 1, end[:, None])
    rows = torch.stack([start[:, None].expand_as(index), stop, index])
    padding = index < 0
    return torch.where(padding, torch.tensor([0, 0, -1])[:, None, None], rows).int()


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random queries and keys of a shape as in ``SHAPES``."""
    batch, kv_heads, group, rows, keys, dim = shape
    q = torch.randn(batch, kv_heads * group, rows, dim).to(dtype)
    return q, torch.randn(batch, kv_heads, keys, dim).to(dtype)


def packed(x: Tensor) -> Tensor:
    """Sequences one after the other, ``(T, heads, D)``, as one sample."""
    return x.transpose(0, 1)[None]


def check(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Bound the error relative to the largest column, as sums grow with the number of rows."""
    assert not got.isnan().any()
    assert got.shape == want.shape
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert (got.cpu().double() - want).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_last_rows_causal(place: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = inputs(shape, dtype)
    rows, keys = shape[3], shape[4]
    index = torch.arange(keys - rows, keys).expand(shape[0], -1)
    bounds = torch.zeros(shape[0]), torch.full((shape[0],), keys)
    want = matrix(q, k, causal_mask(index, keys, *bounds), shape[5] ** -0.5)
    # Inputs of 16 bits are multiplied exactly and summed in fp32, so one tolerance serves all.
    got = attention_colsum(q.to(place), k.to(place), heads="none")
    check(got, want.sum(2))
    check(attention_colsum(q.to(place), k.to(place)), want.sum(2).mean(1))


@pytest.mark.parametrize(("rows", "block"), [(70, 450), (300, None)])
def test_rows_in_any_order_with_padding(
    place: torch.device, rows: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain PyTorch streams over few rows at a time; many rows skip row blocks by their bounds."""
    if block:
        monkeypatch.setitem(attention_colsum.__globals__, "BLOCK_ELEMENTS", block)
    q, k = inputs((3, 2, 2, rows, 150, 64))
    start, end = torch.tensor([0, 40, 149]), torch.tensor([150, 100, 150])
    index = torch.randint(-20, 150, (3, rows))
    want = matrix(q, k, causal_mask(index, 150, start, end), 0.3).sum(2)
    got = attention_colsum(
        q.to(place), k.to(place), visible=visible_rows(index, start, end).to(place),
        scale=0.3, heads="none",
    )  # fmt: skip
    check(got, want)
    column = torch.arange(150)
    outside = (column < start[:, None]) | (column >= end[:, None])
    assert (got.cpu()[outside[:, None].expand_as(got)] == 0).all()


def test_non_causal(place: torch.device) -> None:
    q, k = inputs((2, 2, 2, 9, 70, 64))
    visible = torch.ones(2, 9, 70, dtype=torch.bool)
    got = attention_colsum(q.to(place), k.to(place), causal=False)
    check(got, matrix(q, k, visible, 64**-0.5).sum(2).mean(1))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate(place: torch.device, causal: bool) -> None:
    queries, keys = [3, 0, 300, 1], [90, 5, 300, 17]
    q, k = torch.randn(sum(queries), 4, 64), torch.randn(sum(keys), 2, 64)
    rows, end = [], 0
    for n, columns in zip(queries, keys, strict=True):
        end += columns
        own = range(end - n, end)
        rows += [(end - columns, i + 1 if causal else end, i) for i in own]
    visible = torch.tensor(rows, dtype=torch.int32).T[:, None].to(place)
    got = attention_colsum(packed(q).to(place), packed(k).to(place), visible=visible, heads="none")
    parts = []
    for rows, columns, part_q, part_k in zip(
        queries, keys, q.split(queries), k.split(keys), strict=True
    ):
        index = torch.arange(columns - rows, columns)[None]
        visible = causal_mask(index, columns, torch.zeros(1), torch.tensor([columns]))
        visible = visible if causal else torch.ones_like(visible)
        part_q, part_k = part_q.transpose(0, 1)[None], part_k.transpose(0, 1)[None]
        parts.append(matrix(part_q, part_k, visible, 64**-0.5).sum(2)[0])
    check(got[0], torch.cat(parts, dim=1))


def test_row_weights(place: torch.device) -> None:
    q, k = inputs((2, 2, 2, 6, 40, 64))
    index = torch.arange(34, 40).expand(2, -1)
    dense = matrix(q, k, causal_mask(index, 40, torch.zeros(2), torch.full((2,), 40)), 64**-0.5)
    for shape, wide in (((6,), (1, 1, 6)), ((2, 6), (2, 1, 6)), ((2, 4, 6), (2, 4, 6))):
        weights = torch.rand(shape)
        got = attention_colsum(q.to(place), k.to(place), weights.to(place), heads="none")
        check(got, (dense * weights.view(wide)[..., None]).sum(2))


def test_small_sums_stay_apart_in_the_root_mean_square(place: torch.device) -> None:
    """A sharp softmax leaves sums below 1e-19, whose squares fp32 cannot represent."""
    q = torch.zeros(1, 2, 1, 16)
    q[..., 0] = 16.0
    k = torch.zeros(1, 2, 12, 16)
    k[0, 0, :, 0], k[0, 1, :, 0] = -torch.arange(12.0), -torch.arange(12.0).flip(0)
    k[..., 6:, 0] -= 16  # far from the best key on both heads
    sums = matrix(q.double(), k.double(), torch.ones(1, 1, 12, dtype=torch.bool), 0.25).sum(2)
    expected = sums.square().mean(1).sqrt()
    assert (expected < 1e-20).sum() > 2
    got = attention_colsum(q.to(place), k.to(place), heads="rms", causal=False).cpu().double()
    assert ((got - expected).abs() < 1e-4 * expected).all()


def test_weights_of_either_sign_in_the_root_mean_square(place: torch.device) -> None:
    q, k = inputs((1, 2, 2, 4, 30, 64))
    weights = torch.linspace(-1, 0.5, 4)
    index = torch.arange(26, 30)[None]
    dense = matrix(q, k, causal_mask(index, 30, torch.zeros(1), torch.tensor([30])), 64**-0.5)
    sums = (dense * weights[:, None]).sum(2)
    got = attention_colsum(q.to(place), k.to(place), weights.to(place), heads="rms")
    check(got, sums.square().mean(1).sqrt())
    nothing = attention_colsum(q.to(place), k.to(place), 0 * weights.to(place), heads="rms")
    assert (nothing == 0).all()


@pytest.mark.parametrize(("size", "block"), [(50, 7 * 2 * 2 * 50), (280, None)])
def test_repeated_application(
    place: torch.device, size: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps s ← sM at temperature 0.1 with left padding equal five matrix products."""
    if block:
        monkeypatch.setitem(attention_colsum.__globals__, "BLOCK_ELEMENTS", block)
    q, k = inputs((2, 1, 2, size, size, 32))
    start = torch.tensor([0, 13])
    index = torch.arange(size).expand(2, -1)
    index = torch.where(index >= start[:, None], index, -1)
    dense = matrix(q, k, causal_mask(index, size, start, torch.full((2,), size)), 32**-0.5 / 0.1)
    scores = torch.full((2, 4, 1, size), 1 / size, dtype=torch.float64)[:, :2]
    for _ in range(5):
        scores = scores @ dense
    want = scores[:, :, 0].square().mean(1).sqrt()
    weights = torch.full((size,), 1 / size)
    got = attention_colsum(
        q.to(place), k.to(place), weights.to(place), temperature=0.1, heads="rms", iterations=5,
        visible=visible_rows(index, start, torch.full((2,), size)).to(place),
    )  # fmt: skip
    check(got, want)


def test_repeated_application_where_rows_see_only_earlier_keys(place: torch.device) -> None:
    """Rows of later blocks see ten keys of the first block, or keys up to the middle of theirs."""
    q, k = inputs((2, 1, 2, 130, 130, 16))
    index, end = torch.arange(130).expand(2, -1), torch.tensor([10, 70])
    start = torch.zeros(2, dtype=torch.int64)
    dense = matrix(q, k, causal_mask(index, 130, start, end), 0.25)
    weights = torch.rand(130)
    want = (weights.double() @ dense)[:, :, None] @ dense
    for samples in (slice(0, 1), slice(0, 2)):
        got = attention_colsum(
            q[samples].to(place), k[samples].to(place), weights.to(place), heads="none",
            iterations=2, visible=visible_rows(index, start, end)[:, samples].to(place),
        )  # fmt: skip
        check(got, want[samples, :, 0])


def test_repeated_application_over_ragged_sequences(place: torch.device) -> None:
    """Sequences of odd lengths in one packed batch, each as if it were alone."""
    lengths = [3, 0, 70, 1, 17]
    q, k = torch.randn(sum(lengths), 4, 24), torch.randn(sum(lengths), 2, 24)
    weights = torch.rand(sum(lengths))
    parts = []
    for part_q, part_k, own in zip(
        q.split(lengths), k.split(lengths), weights.double().split(lengths), strict=True
    ):
        size = len(own)
        index = torch.arange(size)[None]
        mask = causal_mask(index, size, torch.zeros(1), torch.tensor([size]))
        part_q, part_k = part_q.transpose(0, 1)[None], part_k.transpose(0, 1)[None]
        scores = own.expand(1, 4, 1, size)
        for _ in range(3 if size else 0):
            scores = scores @ matrix(part_q, part_k, mask, 24**-0.5)
        parts.append(scores[0, :, 0])
    key = torch.arange(sum(lengths))
    first = torch.cat([(torch.ones(n) * sum(lengths[:i])).long() for i, n in enumerate(lengths)])
    got = attention_colsum(
        packed(q).to(place), packed(k).to(place), weights.to(place), heads="none", iterations=3,
        visible=torch.stack([first, key + 1, key])[:, None].int().to(place),
    )  # fmt: skip
    check(got[0], torch.cat(parts, dim=1))


@pytest.mark.parametrize("magnitude", [30.0, 1000.0])
def test_extreme_logits(place: torch.device, magnitude: float) -> None:
    q, k = inputs((1, 1, 2, 40, 200, 64))
    q = q * magnitude
    index = torch.arange(160, 200)[None]
    dense = matrix(q, k, causal_mask(index, 200, torch.zeros(1), torch.tensor([200])), 64**-0.5)
    got = attention_colsum(q.to(place), k.to(place))
    # fp32 logits have a rounding error of about 1e-7 of the logit, which is large for these.
    check(got, dense.sum(2).mean(1), 1e-5 * magnitude)
    assert torch.allclose(got.sum(-1).cpu(), torch.tensor([40.0]), rtol=1e-3)


def dense(q: Tensor, k: Tensor, v: Tensor, frames: int, causal: bool, scale: float) -> Tensor:
    """Attention with a dense mask, in fp64."""
    queries, keys = q.shape[2], k.shape[2]
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        seen = math.floor(i * frames / queries) + 1 if causal else frames
        mask[i, : min(seen, frames) * (keys // frames)] = True
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double()


# (samples, queries, frames, tokens per frame, head dim)
SHAPES_CCAM_ATTENTION = [
    (1, 1, 1, 1, 16),
    (1, 37, 5, 11, 24),
    (2, 5, 9, 70, 64),
    (2, 70, 3, 90, 72),
    (1, 6, 20, 30, 128),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES_CCAM_ATTENTION, ids=str)
def test_matches_dense(place: torch.device, shape: tuple, causal: bool) -> None:
    batch, queries, frames, tokens, dim = shape
    q = torch.randn(batch, 2, queries, dim)
    k, v = (torch.randn(batch, 2, frames * tokens, dim) for _ in range(2))
    want = dense(q, k, v, frames, causal, dim**-0.5)
    got = ccam_attention(q.to(place), k.to(place), v.to(place), frames, causal=causal)
    assert torch.allclose(got.cpu().double(), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(place: torch.device, dtype: torch.dtype) -> None:
    q = torch.randn(1, 3, 130, 64).to(dtype)
    k, v = (torch.randn(1, 3, 6 * 100, 64).to(dtype) for _ in range(2))
    want = dense(q, k, v, 6, True, 0.2)
    got = ccam_attention(q.to(place), k.to(place), v.to(place), 6, scale=0.2)
    assert got.dtype == dtype
    # Probabilities and the result are rounded once each to the input dtype.
    tolerance = 2 * torch.finfo(dtype).eps * v.abs().max().item()
    assert (got.cpu().double() - want).abs().max() <= tolerance


def test_later_frames_do_not_reach_early_queries(place: torch.device) -> None:
    """Frames that a query does not see leave its result bit for bit the same, however large."""
    q = torch.randn(1, 2, 8, 32)
    k, v = (torch.randn(1, 2, 4 * 70, 32) for _ in range(2))
    want = ccam_attention(q.to(place), k.to(place), v.to(place), 4)
    later = torch.full_like(k[:, :, 140:], 1e4)
    k2, v2 = torch.cat([k[:, :, :140], later], 2), torch.cat([v[:, :, :140], later], 2)
    got = ccam_attention(q.to(place), k2.to(place), v2.to(place), 4)
    assert torch.equal(got[:, :, :4], want[:, :, :4])
    assert not torch.allclose(got[:, :, 4:], want[:, :, 4:], atol=1e-2)


def test_frames_that_no_query_sees_may_hold_any_values(place: torch.device) -> None:
    """These are the last frames of a video with F > Q: the last of 4 queries sees 7 of 9."""
    q = torch.randn(2, 2, 4, 32)
    k, v = (torch.randn(2, 2, 9 * 30, 32) for _ in range(2))
    want = ccam_attention(q.to(place), k.to(place), v.to(place), 9)
    k[:, :, 210:], v[:, :, 210:] = math.nan, math.inf
    got = ccam_attention(q.to(place), k.to(place), v.to(place), 9)
    assert torch.equal(got, want)


def test_extreme_logits_ccam_attention(place: torch.device) -> None:
    q = torch.randn(1, 1, 20, 32) * 1000
    k, v = (torch.randn(1, 1, 120, 32) for _ in range(2))
    got = ccam_attention(q.to(place), k.to(place), v.to(place), 3)
    want = dense(q, k, v, 3, True, 32**-0.5)
    assert torch.allclose(got.cpu().double(), want, atol=1e-2)


@pytest.mark.parametrize(("queries", "frames"), [(1, 1), (4, 7), (7, 4), (1024, 96), (5, 100)])
def test_rule(queries: int, frames: int) -> None:
    seen = [visible_frames(i, queries, frames) for i in range(queries)]
    assert seen == [i * frames // queries + 1 for i in range(queries)]
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] <= frames
    assert seen[-1] == frames - (math.ceil(frames / queries) - 1)
    flat = [s for first, end, s in runs(queries, frames) for _ in range(first, end)]
    assert flat == seen
