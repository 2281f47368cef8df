"""frame_pool is compared with a loop over output cells."""

import math

import pytest
import torch
from tokencomp.kernels import KernelError, frame_pool
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


def bilinear(frame: Tensor, h: int, w: int) -> Tensor:
    """Interpolation between the four cell centres next to every output centre."""
    height, width, _ = frame.shape
    cells = []
    for i in range(h):
        for j in range(w):
            y = max(0.0, (i + 0.5) * height / h - 0.5)
            x = max(0.0, (j + 0.5) * width / w - 0.5)
            total = torch.zeros(frame.shape[2], dtype=frame.dtype)
            for dy, wy in ((0, 1 - y % 1), (1, y % 1)):
                for dx, wx in ((0, 1 - x % 1), (1, x % 1)):
                    row = min(int(y) + dy, height - 1)
                    column = min(int(x) + dx, width - 1)
                    total += wy * wx * frame[row, column]
            cells.append(total)
    return torch.stack(cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["area", "bilinear"])
@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((1, 1, 1, 3), [(1, 1)]),
        ((3, 4, 6, 64), [(4, 6), (2, 3), (2, 3)]),
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
    mode: str,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(shape).to(dtype)
    pool = area if mode == "area" else bilinear
    want = torch.cat([pool(f.double(), *grid) for f, grid in zip(x, grids, strict=True)])
    got = frame_pool(x.to(place), grids, mode)
    assert got.dtype == dtype
    # The result is rounded once to the output dtype, and the interpreter truncates instead.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(got.cpu().double(), want, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("mode", ["area", "bilinear"])
def test_full_grid_returns_the_frame_bit_for_bit(place: torch.device, mode: str) -> None:
    x = torch.randn(2, 5, 3, 40).bfloat16()
    assert torch.equal(frame_pool(x.to(place), [(5, 3)] * 2, mode).cpu(), x.flatten(0, 2))


def test_strided_frames(place: torch.device) -> None:
    x = torch.randn(4, 40, 5, 6, device=place).permute(0, 2, 3, 1)
    grids = [(2, 2)] * 4
    assert torch.allclose(frame_pool(x, grids), frame_pool(x.contiguous(), grids), atol=1e-6)
    wide = torch.randn(4, 5, 6, 80, device=place)
    narrow = wide[:, :, :, :40]
    assert torch.equal(frame_pool(narrow, grids), frame_pool(narrow.contiguous(), grids))


def test_gradient(place: torch.device) -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, device=place, requires_grad=True)
    for mode in ("area", "bilinear"):
        grids = [(4, 3), (2, 2)]
        assert torch.autograd.gradcheck(lambda x, m=mode, g=grids: frame_pool(x, g, m), x)


def test_no_frames(place: torch.device) -> None:
    assert frame_pool(torch.randn(0, 4, 4, 8, device=place), []).shape == (0, 8)


def test_bad_input(place: torch.device) -> None:
    x = torch.randn(2, 4, 4, 8, device=place)
    with pytest.raises(KernelError, match="1 grids for 2 frames"):
        frame_pool(x, [(2, 2)])
    for grid in ((0, 2), (5, 4)):
        with pytest.raises(KernelError, match="must be within"):
            frame_pool(x, [(2, 2), grid])
    with pytest.raises(KernelError, match="mode='max'"):
        frame_pool(x, [(2, 2)] * 2, "max")
    with pytest.raises(KernelError, match="must have shape"):
        frame_pool(x[0], [(2, 2)] * 2)
