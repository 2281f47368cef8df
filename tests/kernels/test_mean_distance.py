"""mean_distance is compared with the mean over all pairs of rows, one by one."""

import pytest
import torch
from support.max_min import distances
from tokencomp.kernels import mean_distance
from tokencomp.kernels.maxmin_select import naive


@pytest.mark.parametrize("kind", ["offset", "zero rows", "few rows", "flat", "copies", "large"])
def test_mean_distance(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean equals that over all pairs of rows, computed one by one."""
    x = torch.randn({"few rows": 2}.get(kind, 50), 33) + (3.0 if kind == "offset" else 0.5)
    if kind == "zero rows":
        x[::3] = 0.0
    elif kind in ("flat", "copies"):
        x[:] = x[0]
        x[1] += 1.0 if kind == "flat" else 0.0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        low = (x * (200 if kind == "large" else 1)).to(dtype)
        unit = [row / row.norm() if row.norm() else row * 0 for row in low.double()]
        expected = sum(1 - a @ b for a in unit for b in unit) / len(unit) ** 2
        for block in (1 << 24, 100):
            monkeypatch.setattr(naive, "GRAM_ELEMENTS", block)
            got = mean_distance(low)
            assert got.shape == (1,) and got.dtype == torch.promote_types(dtype, torch.float32)
            assert abs(float(got) - float(expected)) < 1e-5


def test_mean_distance_of_spans(place: torch.device) -> None:
    """Every span has the mean of its own pairs, whatever stands beside it."""
    lengths = [33, 1, 40, 33]
    x = torch.randn(sum(lengths), 70) + 0.3
    got = mean_distance(x.to(place), spans=lengths).cpu()
    alone = torch.cat([mean_distance(part.to(place)).cpu() for part in x.split(lengths)])
    assert torch.equal(got, alone)
    expected = [distances(part).clamp(min=0).mean() for part in x.split(lengths)]
    assert torch.allclose(got.double()[[0, 2, 3]], torch.stack(expected)[[0, 2, 3]], atol=1e-5)
