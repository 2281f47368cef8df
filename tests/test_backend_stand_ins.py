"""The stand-ins for FlashAttention and FlexAttention against what PyTorch itself has."""

from __future__ import annotations

import pytest
import torch
from support.backends import flash_attn_func, flash_attn_varlen_func, flex_attention
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import scaled_dot_product_attention

WINDOWS = [(-1, -1), (2, 2), (3, -1), (0, 1)]


def sequence(n: int, m: int, batch: int = 2) -> list[Tensor]:
    """Queries (B, n, 4, 8), and keys and values (B, m, 2, 8)."""
    return [torch.randn(batch, n, 4, 8), *(torch.randn(batch, m, 2, 8) for _ in range(2))]


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """SDPA with a mask from a loop: the last query stands at the last key."""
    n, m = q.shape[1], k.shape[1]
    seen = torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            place = i + m - n
            left = window[0] < 0 or j >= place - window[0]
            right = j <= place if causal else window[1] < 0 or j <= place + window[1]
            seen[i, j] = left and right
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    return out.masked_fill(~seen.any(-1)[:, None], 0.0).transpose(1, 2)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (1, 9), (4, 9), (9, 4)])
def test_flash(n: int, m: int, causal: bool, window: tuple[int, int]) -> None:
    q, k, v = sequence(n, m)
    options = dict(softmax_scale=0.3, causal=causal, window_size=window)
    expected = naive(q, k, v, causal, window)
    torch.testing.assert_close(flash_attn_func(q, k, v, **options), expected)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    bounds = [torch.tensor([0, size, 2 * size]).int() for size in (n, m)]
    found = flash_attn_varlen_func(*flat, *bounds, n, m, **options)
    torch.testing.assert_close(found.unflatten(0, (2, n)), expected)


@pytest.mark.parametrize(
    "bounds", [[0, 3, 6], [1, 3, 7], [0, 5, 3, 7], [0, 7]], ids=["short", "late", "back", "long"]
)
def test_flash_refuses_bounds_that_its_kernel_would_misread(bounds: list[int]) -> None:
    q, k, v = (x[0] for x in sequence(7, 7, 1))
    lengths = torch.tensor(bounds).int()
    with pytest.raises(AssertionError):
        flash_attn_varlen_func(q, k, v, lengths, lengths, 5, 5)


def test_flex() -> None:
    """Padding, a window and a bias, as functions; one query sees nothing."""
    q, k, v = (x.transpose(1, 2) for x in sequence(6, 9))
    real = torch.rand(2, 9) > 0.3
    bias = torch.randn(2, 4, 6, 9)

    def shown(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return real[b, j] & (j <= i + 3) & (j > i - 2) & (i != 4)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[b, h, i, j]

    mask = torch_flex.create_block_mask(shown, 2, None, 6, 9, device="cpu")
    options = dict(score_mod=biased, block_mask=mask, scale=0.3, enable_gqa=True)
    expected = torch_flex.flex_attention(q, k, v, **options)
    torch.testing.assert_close(flex_attention(q, k, v, **options), expected)
