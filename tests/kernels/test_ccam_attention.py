"""ccam_attention is compared with dense masked attention in fp64."""

import math

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import KernelError, ccam_attention, visible_frames
from tokencomp.kernels.ccam_attention.rule import runs
from torch import Tensor


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
SHAPES = [
    (1, 1, 1, 1, 16),
    (1, 37, 5, 11, 24),
    (2, 5, 9, 70, 64),
    (2, 70, 3, 90, 72),
    (1, 6, 20, 30, 128),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


def test_extreme_logits(place: torch.device) -> None:
    q = torch.randn(1, 1, 20, 32) * 1000
    k, v = (torch.randn(1, 1, 120, 32) for _ in range(2))
    got = ccam_attention(q.to(place), k.to(place), v.to(place), 3)
    want = dense(q, k, v, 3, True, 32**-0.5)
    assert torch.allclose(got.cpu().double(), want, atol=1e-2)


def test_gradient(place: torch.device) -> None:
    q = torch.randn(1, 1, 4, 4, dtype=torch.float64, device=place, requires_grad=True)
    k, v = (
        torch.randn(1, 1, 6, 4, dtype=torch.float64, device=place, requires_grad=True)
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda *t: ccam_attention(*t, 3), (q, k, v))


@pytest.mark.parametrize(("queries", "frames"), [(1, 1), (4, 7), (7, 4), (1024, 96), (5, 100)])
def test_rule(queries: int, frames: int) -> None:
    seen = [visible_frames(i, queries, frames) for i in range(queries)]
    assert seen == [i * frames // queries + 1 for i in range(queries)]
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] <= frames
    assert seen[-1] == frames - (math.ceil(frames / queries) - 1)
    flat = [s for first, end, s in runs(queries, frames) for _ in range(first, end)]
    assert flat == seen


def test_no_frames_and_bad_input(place: torch.device) -> None:
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 12, 8)
    none = k[:, :, :0]
    assert (ccam_attention(*(x.to(place) for x in (q, none, none)), 0) == 0).all()
    changes: list[tuple[dict[str, object], str]] = [
        ({"frames": 5}, "not a multiple of 5 frames"),
        ({"frames": 0}, "not a multiple of 0 frames"),
        ({"k": none, "v": none, "frames": -1}, "0 keys .* -1 frames"),
        ({"k": torch.randn(2, 1, 9, 8)}, "do not fit"),
        ({"q": torch.randn(2, 4, 8)}, "must have shape"),
    ]
    refused(ccam_attention, {"q": q, "k": k, "v": k, "frames": 3}, changes)


def test_triton_head_dimension(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    q = torch.randn(1, 1, 4, 160, device=device)
    with pytest.raises(KernelError, match="head dimension 160"):
        ccam_attention(q, q, q, 2)
