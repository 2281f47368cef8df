"""Merging of the rest against loops: spans of many lengths in one batch."""

from __future__ import annotations

import pytest
import torch
from support import matrix

from tokencomp import Reduction
from tokencomp.engine.weights import merge_rest
from tokencomp.tokens import nearest


@pytest.mark.parametrize("block", [1 << 24, 16])
@pytest.mark.parametrize("special", [0, 2])
def test_every_patch_goes_to_the_nearest_kept_one(
    special: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are the sizes from before, special tokens stay, and a span may keep no patch."""
    monkeypatch.setattr(nearest, "BLOCK", block)
    grids = [(1, 5, 6), (2, 2, 3), (1, 5, 6), (1, 1, 4)]
    batch = matrix.joined([matrix.tokens(g, special, seed=i) for i, g in enumerate(grids)])
    batch.sizes = torch.arange(len(batch.features)) % 3 + 1.0
    patches = [[i for i in range(n) if not t.special[i]] for n, t in spans(batch)]
    budgets = [9, 4, 7, 0]
    pairs = zip(patches, budgets, strict=True)
    kept = [own[1 :: len(own) // b][:b] if b else [] for own, b in pairs]
    rows: list[int] = []
    expected: dict[int, tuple[torch.Tensor, float]] = {}
    for start, (n, tokens), stay in zip(batch.starts, spans(batch), kept, strict=True):
        fixed = tokens.special.nonzero()[:, 0].tolist()
        rows += sorted(start + i for i in [*fixed, *stay])
        groups = {i: [i] for i in stay}
        for i in set(range(n)) - {*fixed, *stay}:
            near = [
                torch.cosine_similarity(tokens.features[i], tokens.features[k], 0) for k in stay
            ]
            if near:
                groups[stay[int(torch.stack(near).argmax())]].append(i)
        for i in fixed:
            expected[start + i] = tokens.features[i], 1.0
        for k, members in groups.items():
            weights = tokens.sizes[members]
            mean = (weights[:, None] * tokens.features[members]).sum(0) / weights.sum()
            expected[start + k] = mean, float(weights.sum())
    keeps = [b + special for b in budgets]
    every = [True] * len(keeps)
    got = merge_rest(batch, Reduction(torch.tensor(rows)), keeps, every, "x")
    assert got.keep.tolist() == rows == sorted(expected)
    assert (got.merged - torch.stack([expected[r][0] for r in rows])).abs().max() < 1e-5
    assert got.sizes.tolist() == [expected[r][1] for r in rows]
    assert max(got.sizes) > 5


def spans(batch):
    """Length and tokens of every span."""
    return [(len(tokens), tokens) for tokens in batch.spans()]


def test_of_equal_patches_the_first_takes_the_rest() -> None:
    given = matrix.tokens((1, 2, 4))
    given.features[:] = given.features[0]
    rows = Reduction(torch.tensor([2, 5, 6]))
    got = merge_rest(matrix.joined([given]), rows, [3], [True], "x")
    assert got.sizes.tolist() == [6, 1, 1]


def test_spans_that_do_not_merge_lose_their_patches() -> None:
    one, other = matrix.tokens((1, 2, 4)), matrix.tokens((1, 2, 4), seed=1)
    batch = matrix.joined([one, other])
    rows = Reduction(torch.tensor([2, 5, 8, 11]))
    got = merge_rest(batch, rows, [2, 2], [False, True], "x")
    assert torch.equal(got.merged[:2], one.features[[2, 5]])
    assert got.sizes[:2].tolist() == [1, 1] and got.sizes[2:].sum() == 8
    alone = merge_rest(matrix.joined([other]), Reduction(torch.tensor([0, 3])), [2], [True], "x")
    assert torch.equal(got.merged[2:], alone.merged)
