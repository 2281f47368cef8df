"""AIM's two parts against references in the plainest loops, from the paper's description."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from support import plans
from support.families import Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp.reducers.bipartite import Bipartite
from tokencomp.tokens.tokens import Tokens


def merge_frame_reference(x: list[list[float]], keep: int) -> list[tuple[int, list[float]]]:
    """Plain-mean bipartite merging of one frame: (row, feature) of the survivors, raster order."""
    rows = [(i, list(v)) for i, v in enumerate(x)]

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))

    while len(rows) > keep:
        budget = min(len(rows) - keep, len(rows) // 2)
        evens, odds = range(0, len(rows), 2), range(1, len(rows), 2)
        best = []
        for a in evens:
            scored = [(cosine(rows[a][1], rows[b][1]), -b) for b in odds]
            if scored:
                value, minus_b = max(scored)
                best.append((-value, a, -minus_b))
        gone: dict[int, list[int]] = {}
        for _, a, b in sorted(best)[:budget]:
            gone.setdefault(b, []).append(a)
        dropped = {a for members in gone.values() for a in members}
        merged = []
        for i, (row, value) in enumerate(rows):
            if i in dropped:
                continue
            members = [value] + [rows[a][1] for a in gone.get(i, [])]
            merged.append((row, [sum(c) / len(members) for c in zip(*members, strict=True)]))
        rows = merged
    return rows


@pytest.mark.parametrize(("grid", "keep"), [((1, 7, 7), 30), ((1, 14, 14), 49), ((3, 5, 4), 21)])
def test_merge(grid: tuple[int, int, int], keep: int) -> None:
    t, h, w = grid
    x = torch.randn(t * h * w, 6, dtype=torch.float64)
    out = Bipartite(weighted=False).reduce(Tokens(x, [grid], [keep]))
    expected = []
    for frame in range(t):
        first = frame * h * w
        quota = keep * (frame + 1) // t - keep * frame // t
        part = merge_frame_reference(x[first : first + h * w].tolist(), quota)
        expected += [(row + first, value) for row, value in part]
    assert out.rows.tolist() == [row for row, _ in expected]
    torch.testing.assert_close(out.features, torch.tensor([v for _, v in expected]).double())


def test_weighted_merge_preserves_the_sum() -> None:
    """Size-weighted means carry the mass of every original token exactly once."""
    x = torch.randn(4 * 36, 5, dtype=torch.float64)
    out = Bipartite().reduce(Tokens(x, [(4, 6, 6)], [22]))
    assert out.weights.sum() == 144
    torch.testing.assert_close((out.features * out.weights[:, None].double()).sum(0), x.sum(0))


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


@pytest.mark.parametrize("rows", ["last", "text"])
def test_attention_scores(family: Family, rows: str) -> None:
    """Kept tokens are the best by transformers' own eager attention maps."""
    model = family.build("eager")
    inputs = family.batch([[text(3), family.image(0), text(6, 3)]])
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[1][0].mean(0)
    reducer = {"last": tokencomp.make_reducer("prune", score="last_query"), "text": plans.TextTop()}
    plan = tokencomp.Plan((tokencomp.Stage(2, 0.4, reducer[rows]),))
    with tokencomp.patch(model, plan=plan) as handle, torch.no_grad():
        model(**inputs)
        stats = handle.stats
    visual = {c for span in stats.spans[0] for c in range(span.start, span.stop)}
    for span, kept in zip(stats.spans[0], stats.kept(0)[0], strict=True):
        later = [i for i in range(span.stop, attention.shape[0]) if i not in visual]
        received = attention[-1] if rows == "last" else attention[later].mean(0)
        here = received[span.start : span.stop].masked_fill(span.special_mask(), torch.inf)
        best = here.sort(descending=True, stable=True).indices[: len(kept)].sort().values
        assert kept == best.tolist()
