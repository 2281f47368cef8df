"""Dense fp64 distances, and the rule of max-min selection checked choice by choice."""

import math

import torch
from torch import Tensor

COPIES = 1e-5  # rows whose distance is smaller count as copies, as the docstring says


def distances(x: Tensor) -> Tensor:
    """Distances 1 - cos of all pairs of rows in fp64, ``(n, n)``."""
    x = x.double()
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > 0, x / norm, 0.0)
    return (1 - x @ x.T).clamp(min=COPIES)


def differences(x: Tensor) -> Tensor:
    """Root mean squares of the differences of all pairs of rows in fp64, ``(n, n)``."""
    x = x.double()
    return (x[:, None] - x[None]).square().mean(2).sqrt().clamp(min=COPIES)


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def k_center(x: Tensor, keep: int) -> list[int]:
    """Rows of a greedy k-center, ascending, one distance at a time."""
    centre = x.mean(0)
    chosen = [max(range(len(x)), key=lambda i: (rms(x[i], centre), -i))]
    while len(chosen) < keep:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(rms(x[i], x[j]) for j in chosen), -i)))
    return sorted(chosen)


def naive_steps(x: Tensor, grid: tuple[int, int, int], weight: float, left: list[int]) -> Tensor:
    """Features with the change from step to step, one cell at a time; `left`: cells in order."""
    area, rows = grid[1] * grid[2], dict(zip(left, x, strict=True))
    out = []
    for cell in left:
        others = [rows[c] for c in (cell - area, cell + area) if c in rows]
        change = max([rms(rows[cell], other) for other in others], default=0.0)
        angle = cell // area * math.pi * (3 - math.sqrt(5))
        place = [weight * change * f(angle) / math.sqrt(2) for f in (math.cos, math.sin)]
        out.append(torch.cat([rows[cell] / math.sqrt(x.shape[1]), torch.tensor(place)]))
    return torch.stack(out)


def check_greedy(
    x: Tensor, order: list[int], weights: Tensor | None, tolerance: float,
    margin: float = 0.0, distance: Tensor | None = None,
) -> None:  # fmt: skip
    """Each choice after the first has the best remaining score, up to rounding."""
    assert len(set(order)) == len(order)
    distance = distances(x) if distance is None else distance
    weights = torch.ones(len(x)) if weights is None else weights
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64)
    for step, choice in enumerate(order[1:], start=1):
        nearest = torch.minimum(nearest, distance[order[step - 1]])
        score = (nearest + margin) * weights.double()
        score[order[:step]] = -1.0
        assert score[choice] >= score.max() - tolerance
