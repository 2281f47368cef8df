"""AIM's two parts against references in the plainest loops, from the paper's description."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from support.families import Family, text
from support.merge_loops import Row, merge_group
from torch import Tensor, nn

import tokencomp
from tokencomp.reducers.bipartite import Bipartite
from tokencomp.tokens.tokens import Tokens


@pytest.mark.parametrize(("grid", "keep"), [((1, 7, 7), 30), ((1, 14, 14), 49), ((3, 5, 4), 21)])
def test_merge(grid: tuple[int, int, int], keep: int) -> None:
    t, h, w = grid
    x = torch.randn(t * h * w, 6, dtype=torch.float64)
    out = Bipartite(weighted=False).reduce(Tokens(x, [grid], [keep]))
    expected = []
    for frame in range(t):
        first = frame * h * w
        quota = keep * (frame + 1) // t - keep * frame // t
        rows = [Row(first + i, 1.0, value) for i, value in enumerate(x[first:][: h * w].tolist())]
        expected += merge_group(rows, quota, weighted=False)
    assert out.patches.tolist() == [row.place for row in expected]
    torch.testing.assert_close(out.features, torch.tensor([row.x for row in expected]).double())


def pagerank_reference(
    q: torch.Tensor, k: torch.Tensor, scale: float, tau: float, steps: int
) -> list[float]:
    """Per head s ← s·M five times, M a dense causal softmax; root mean square over heads."""
    heads, n, _ = q.shape
    group = heads // k.shape[0]
    total = [0.0] * n
    for h in range(heads):
        matrix = []
        for i in range(n):
            row = [float(q[h, i] @ k[h // group, j]) * scale / tau for j in range(i + 1)]
            top = max(row)
            exp = [math.exp(v - top) for v in row]
            matrix.append([v / sum(exp) for v in exp] + [0.0] * (n - i - 1))
        s = [1.0 / n] * n
        for _ in range(steps):
            s = [sum(s[i] * matrix[i][j] for i in range(n)) for j in range(n)]
        total = [t + v * v for t, v in zip(total, s, strict=True)]
    return [math.sqrt(t / heads) for t in total]


def queries_and_keys(
    model: nn.Module, family: Family, inputs: dict[str, Tensor], layer: int
) -> tuple[Tensor, Tensor, float]:
    """Captured where the model's eager attention uses them, rotated.

    q (heads, n, d), k (kv heads, n, d) and the logit scale of sample 0 at a decoder layer."""
    attn = family.decoder(model).layers[layer].self_attn
    module = sys.modules[type(attn).__module__]
    original, found = module.eager_attention_forward, {}

    def spy(mod, query, key, value, *args, **kwargs):
        if mod is attn:
            found.update(q=query[0].double(), k=key[0].double(), scale=mod.scaling)
        return original(mod, query, key, value, *args, **kwargs)

    module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        module.eager_attention_forward = original
    return found["q"], found["k"], found["scale"]


def test_pagerank_scores(family: Family) -> None:
    """Tokens kept by `prune` are the reference's best, computed from eager q and k."""
    model = family.build("eager")
    image = family.image(0)
    inputs = family.batch([[text(3), image, text(6, 3)]])
    plan = tokencomp.Plan((tokencomp.Stage(2, 0.4, tokencomp.make_reducer("prune")),))
    q, k, scale = queries_and_keys(model, family, inputs, layer=1)
    scores = pagerank_reference(q, k, scale, 0.1, 5)
    with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
        model(**inputs)
        stats = handle.stats
    for span, kept in zip(stats.spans[0], stats.kept(0)[0], strict=True):
        special = set(span.special)
        local = [(-scores[span.start + o], o) for o in range(span.length) if o not in special]
        best = sorted(special) + [o for _, o in sorted(local)[: len(kept) - len(special)]]
        assert kept == sorted(best)
