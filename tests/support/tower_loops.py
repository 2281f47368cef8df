"""Plain loops that methods which read the vision tower are compared with."""

from __future__ import annotations

import itertools
import math

import torch

from support import matrix
from tokencomp import Kept, Tokens, make_reducer
from tokencomp.tokens.signals import TOWER_ATTENTION

Vector = list[float]
Rows = list[tuple[int, Vector, float]]  # place, value, size


def clip(grid: tuple[int, int, int]) -> Tokens:
    """A video with cuts: between them most places repeat, and two move."""
    given, (t, h, w) = matrix.tokens(grid), grid
    g = torch.Generator().manual_seed(5)
    frame = torch.randn(h * w, matrix.DIM, generator=g)
    frames = []
    for f in range(t):
        if f % 5 == 3:
            frame = torch.randn(h * w, matrix.DIM, generator=g)
        moved = frame.clone()
        moved[[f % (h * w), (3 * f + 1) % (h * w)]] = torch.randn(2, matrix.DIM, generator=g)
        frames.append(moved + 0.2 * torch.randn(h * w, matrix.DIM, generator=g))
    given.features = torch.cat(frames)
    return given


def rows_of(tokens: Tokens) -> tuple[list[Vector], list[float]]:
    """Features of the patches, and the attention that the tower's last block pays to them."""
    return tokens.features.double().tolist(), tokens.tower[TOWER_ATTENTION].tolist()


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(rows: list[Vector]) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def mix(share: float, a: Vector, b: Vector) -> Vector:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def best(values: dict[int, float], k: int) -> list[int]:
    """The keys of the k largest values, ascending; ties go to the lower key."""
    return sorted(sorted(values, key=lambda i: (-values[i], i))[:k])


def largest_remainders(weights: list[int], total: int) -> list[int]:
    shares = [total * w / sum(weights) for w in weights]
    counts = [int(s + 1e-9) for s in shares]
    order = sorted(range(len(counts)), key=lambda i: (round(counts[i] - shares[i], 9), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def evenly(total: int, sizes: list[int]) -> list[int]:
    ends = [total * sum(sizes[:i]) // max(sum(sizes), 1) for i in range(len(sizes) + 1)]
    return [b - a for a, b in itertools.pairwise(ends)]


def check(got: Kept, rows: Rows) -> None:
    """The patches of `got` are `rows`, at their places."""
    rows = sorted(rows)
    assert got.patches.tolist() == [place for place, _, _ in rows]
    wanted = torch.tensor([value for _, value, _ in rows])
    torch.testing.assert_close(got.features, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.weights, torch.tensor([size for _, _, size in rows]))


def kept(name: str, tokens: Tokens, places: list[int]) -> bool:
    """Whether the method keeps these patches."""
    return matrix.kept(make_reducer(name), tokens, len(places)).patches.tolist() == sorted(places)


def peaks(
    x: list[Vector], clusters: int, k: int, tango: bool = False
) -> tuple[list[int], list[int]]:
    """Centres by density peaks, ascending, and the number of the centre of every row."""
    n, scale = len(x), 1.0 if tango else math.sqrt(len(x[0]))
    apart = [[math.dist(a, b) / scale for b in x] for a in x]
    if clusters == n:
        return [*range(n)], [*range(n)]
    density = []
    for i, row in enumerate(apart):
        near = sorted(row if not tango else [v for j, v in enumerate(row) if j != i])[:k]
        density.append(math.exp(-sum(v * v for v in near) / len(near)))
    most = max(map(max, apart))
    score = {}
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        score[i] = density[i] * min([apart[i][j] for j in denser], default=most)
    centres = best(score, clusters)
    labels = [min(range(clusters), key=lambda c: (apart[i][centres[c]], c)) for i in range(n)]
    for number, centre in enumerate(centres):
        labels[centre] = number
    return centres, labels
