"""nearest_previous_frame is compared with a loop over tokens."""

import math

import pytest
import torch
from tokencomp.kernels import KernelError, nearest_previous_frame
from torch import Tensor


def by_hand(x: Tensor) -> Tensor:
    """Compare every token with its place in the previous frame in plain loops."""
    frames, height, width, _ = x.shape
    x = x.double()
    similarity = torch.full(x.shape[:3], -math.inf)
    for t in range(1, frames):
        for y in range(height):
            for column in range(width):
                a, b = x[t, y, column], x[t - 1, y, column]
                norm = a.norm() * b.norm()
                similarity[t, y, column] = a @ b / norm if norm else 0.0
    return similarity


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 3, 8), torch.float32),
        ((3, 5, 4, 70), torch.bfloat16),
        ((2, 2, 2, 1100), torch.float32),
    ],
    ids=str,
)
def test_matches_loops(place: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    similarity = nearest_previous_frame(x.to(place))
    assert torch.allclose(similarity.cpu(), by_hand(x), atol=1e-5)


def test_zero_tokens_and_empty_video(place: torch.device) -> None:
    assert (nearest_previous_frame(torch.zeros(2, 2, 2, 4, device=place))[1] == 0).all()
    assert nearest_previous_frame(torch.zeros(0, 2, 2, 4, device=place)).shape == (0, 2, 2)


def test_bad_input(place: torch.device) -> None:
    x = torch.randn(2, 3, 3, 4)
    for frame in (0, 1):
        bad = x.clone()
        bad[frame, 1, 1, 0] = math.nan
        with pytest.raises(KernelError, match="NaN or infinite"):
            nearest_previous_frame(bad.to(place))
    with pytest.raises(KernelError, match="must have shape"):
        nearest_previous_frame(x[0].to(place))
