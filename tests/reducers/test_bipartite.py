"""Merging where earlier stages have left uneven frames, and its arithmetic."""

from __future__ import annotations

import random

import pytest
import torch
from support import matrix, merge_loops

from tokencomp import Tokens, make_reducer


def left_over(grid: tuple[int, int, int], seed: int) -> Tokens:
    """A span of which half of the patches are left, none of the first third."""
    length = grid[0] * grid[1] * grid[2]
    index = sorted(random.Random(seed).sample(range(length // 3, length), length // 2))
    x = torch.randn(len(index), 6, generator=torch.Generator().manual_seed(seed))
    return Tokens(x, [grid], [1], [len(index)], ["video"], torch.tensor(index))


@pytest.mark.parametrize("grid", [(2, 2, 5), (4, 2, 2), (3, 2, 3), (6, 1, 3)])
def test_uneven_frames(grid: tuple[int, int, int], seed: int = 1) -> None:
    """Tokens merge inside their frame, and as many are left as the budget says."""
    given = left_over(grid, seed)
    live = given.index.tolist()
    frame = {cell: cell // (grid[1] * grid[2]) for cell in live}
    frames = merge_loops.rows_of(given.features, live, frame)
    assert len({len(f) for f in frames}) > 1
    for keep in range(1, len(live)):
        expected = merge_loops.merge(frames, keep)
        got = matrix.kept(make_reducer("bipartite"), given, keep)
        assert given.index[got.rows].tolist() == [row.place for row in expected]
        assert got.weights.tolist() == [row.size for row in expected]
        wanted = torch.tensor([row.x for row in expected])
        assert (got.features - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_scores_in_the_models_dtype_would_merge_others(dtype: torch.dtype) -> None:
    given = matrix.tokens((1, 16, 16))
    given.features = (given.features + 4).to(dtype)  # all alike: small differences decide
    (exact,) = merge_loops.rows_of(given.features, list(range(256)), dict.fromkeys(range(256), 0))
    expected = [row.place for row in merge_loops.merge_group(exact, 170)]
    unit = torch.nn.functional.normalize(given.features, dim=1)
    rough = (unit[::2] @ unit[1::2].T).amax(1).sort(descending=True, stable=True).indices[:86] * 2
    assert sorted(set(range(256)) - set(rough.tolist())) != expected
    assert matrix.kept(make_reducer("bipartite"), given, 170).rows.tolist() == expected


EVEN = [1, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 18, 19]  # 4 and 3 of 5 even places leave


@pytest.mark.parametrize(
    ("name", "kept"),
    [("evs", [*range(13)]), ("vidcom2", [*range(7), *range(10, 16)]), ("bipartite", EVEN)],
)
def test_equal_tokens(name: str, kept: list[int]) -> None:
    """Ties go to the lower index in every frame: it stays, or, in `bipartite`, it leaves first."""
    given = matrix.tokens((2, 2, 5))
    given.features = torch.ones_like(given.features)
    assert matrix.kept(make_reducer(name), given, 13).rows.tolist() == kept


@pytest.mark.parametrize("name", ["divprune", "evs", "bipartite", "vidcom2"])
def test_large_finite_features_in_fp16(name: str) -> None:
    """Finite features whose norms overflow fp16 are chosen from like their fp32 copies."""
    given, wide = (matrix.tokens((3, 2, 4), dim=1024) for _ in range(2))
    given.features = (given.features * 4000).half()
    wide.features = given.features.float()
    assert given.features.isfinite().all() and given.features.norm(dim=1).isinf().any()
    a, b = (matrix.kept(make_reducer(name), tokens, 13).rows for tokens in (given, wide))
    assert torch.equal(a, b)
