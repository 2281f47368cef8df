"""frame_pool is compared with a loop over output cells."""

import math

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import frame_pool
from torch import Tensor


def area(frame: Tensor, h: int, w: int) -> Tensor:
    """Mean over the input cells of every output cell."""
    height, width, _ = frame.shape
    cells = []
    for i in range(h):
        for j in range(w):
            rows = range(i * height // h, math.ceil((i + 1) * height / h))
            columns = range(j * width // w, math.ceil((j + 1) * width / w))
            cells.append(torch.stack([frame[y, x] for y in rows for x in columns]).mean(0))
    return torch.stack(cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((4, 7, 5, 70), [(4, 3), (7, 5), (1, 1), (3, 5)]),
        ((2, 14, 14, 130), [(14, 14), (6, 5)]),
        ((2, 3, 3, 1100), [(2, 2), (3, 1)]),
    ],
    ids=str,
)
def test_matches_loops(
    place: torch.device,
    shape: tuple[int, ...],
    grids: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    x = torch.randn(shape).to(dtype)
    want = torch.cat([area(f.double(), *grid) for f, grid in zip(x, grids, strict=True)])
    got = frame_pool(x.to(place), grids)
    assert got.dtype == dtype
    # The result is rounded once to the output dtype, and the interpreter truncates instead.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(got.cpu().double(), want, rtol=tolerance, atol=1e-5)


def test_full_grid_returns_the_frame_bit_for_bit(place: torch.device) -> None:
    x = torch.randn(2, 5, 3, 40).bfloat16()
    assert torch.equal(frame_pool(x.to(place), [(5, 3)] * 2).cpu(), x.flatten(0, 2))


def test_gradient(place: torch.device) -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, device=place, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frame_pool(x, [(4, 3), (2, 2)]), x)


def test_no_frames_and_bad_input(place: torch.device) -> None:
    assert frame_pool(torch.randn(0, 4, 4, 8, device=place), []).shape == (0, 8)
    x = torch.randn(2, 4, 4, 8, device=place)
    changes: list[tuple[dict[str, object], str]] = [
        ({"grids": [(2, 2)]}, "1 grids for 2 frames"),
        ({"grids": [(2, 2), (0, 2)]}, "must be within"),
        ({"grids": [(2, 2), (5, 4)]}, "must be within"),
        ({"x": x[0]}, "must have shape"),
    ]
    refused(frame_pool, {"x": x, "grids": [(2, 2)] * 2}, changes)
