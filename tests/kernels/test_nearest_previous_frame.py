"""nearest_previous_frame is compared with a loop over tokens and offsets."""

import math

import pytest
import torch
from tokencomp.kernels import KernelError, nearest_previous_frame
from torch import Tensor


def by_hand(x: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Compare every token with every token of its window in plain loops."""
    frames, height, width, _ = x.shape
    x = x.double()
    similarity = torch.full(x.shape[:3], -math.inf)
    index = torch.full(x.shape[:3], -1)
    for t in range(1, frames):
        for y in range(height):
            for column in range(width):
                for dy in range(-radius, radius + 1):
                    for dx in range(-radius, radius + 1):
                        i, j = y + dy, column + dx
                        if not (0 <= i < height and 0 <= j < width):
                            continue
                        a, b = x[t, y, column], x[t - 1, i, j]
                        norm = a.norm() * b.norm()
                        cosine = a @ b / norm if norm else torch.tensor(0.0)
                        if cosine > similarity[t, y, column]:
                            similarity[t, y, column] = cosine
                            index[t, y, column] = i * width + j
    return similarity, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "radius"),
    [
        ((1, 3, 3, 8), 0),
        ((3, 1, 1, 5), 2),
        ((3, 5, 4, 70), 0),
        ((3, 5, 4, 70), 1),
        ((2, 4, 6, 130), 3),
        ((2, 2, 2, 1100), 1),
    ],
    ids=str,
)
def test_matches_loops(
    place: torch.device, shape: tuple[int, ...], radius: int, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    similarity, index = nearest_previous_frame(x.to(place), radius)
    want, place_of = by_hand(x, radius)
    assert torch.equal(index.cpu(), place_of)
    assert torch.allclose(similarity.cpu(), want.float(), atol=1e-5)


def test_still_video_points_at_itself(place: torch.device) -> None:
    x = torch.randn(1, 4, 4, 32).expand(3, -1, -1, -1)
    similarity, index = nearest_previous_frame(x.to(place), 2)
    assert torch.equal(index[1:].cpu(), torch.arange(16).view(4, 4).expand(2, 4, 4))
    assert torch.allclose(similarity[1:].cpu(), torch.ones(2, 4, 4), atol=1e-5)
    assert similarity[0].isneginf().all() and (index[0] == -1).all()


def test_zero_tokens_and_empty_video(place: torch.device) -> None:
    similarity, _ = nearest_previous_frame(torch.zeros(2, 2, 2, 4, device=place))
    assert (similarity[1] == 0).all()
    assert nearest_previous_frame(torch.zeros(0, 2, 2, 4, device=place))[0].shape == (0, 2, 2)


def test_bad_input(place: torch.device) -> None:
    x = torch.randn(2, 3, 3, 4)
    for frame in (0, 1):
        bad = x.clone()
        bad[frame, 1, 1, 0] = math.nan
        with pytest.raises(KernelError, match="NaN or infinite"):
            nearest_previous_frame(bad.to(place), 1)
    with pytest.raises(KernelError, match="radius"):
        nearest_previous_frame(x.to(place), 4)
    with pytest.raises(KernelError, match="must have shape"):
        nearest_previous_frame(x[0].to(place))
