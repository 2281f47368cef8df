"""Benchmarks of kernels that select rows."""

import torch

from benchmarks.kernels import case
from benchmarks.kernels.case import Case, Place, prepared
from tokencomp import kernels

# Long spans in max-min selection: candidates of a round, and how many it chooses in the worst case
# that `tests/kernels/test_maxmin.py` counts, a video of 64 frames that stands still. Where
# things move it is several times as many.
CANDIDATES, CHOICES = 2048, 60


@prepared
def maxmin(
    at: Place,
    name: str,
    spans: int,
    tokens: int,
    dim: int,
    keep: float,
    metric: str = "cosine",
    start: str | None = None,
) -> Case:
    """Greedy max-min selection."""
    length = max(16, int(tokens * at.scale)) if spans == 1 else tokens
    count = max(1, int(spans * at.scale)) if spans > 1 else 1
    k = max(1, int(length * keep))
    x = at.values(count * length, dim)
    weights = torch.rand(len(x), device=at.device)
    margin = torch.full((count,), 0.02, device=at.device)
    item = x.element_size()
    if length <= 8192:  # all cosines are stored, and every choice reads a row of them
        products, moved = length**2, length * dim * item + 4 * length * (length + k)
    else:
        rounds = -(-k // CHOICES)
        products = k * length + rounds * CANDIDATES**2
        moved = rounds * (length * dim * item + 4 * CANDIDATES**2) + 4 * k * CANDIDATES
    return Case(
        op="maxmin_select",
        name=name,
        call=lambda: kernels.maxmin_select(
            x,
            k,
            weights,
            spans=length,
            margin=margin,
            metric=metric,
            start=start,
        ),
        flops=count * 2.0 * products * dim,
        bytes=count * moved,
        tensor_cores=at.dtype != torch.float32 and metric == "cosine",
    )


@prepared
def mean_distance(at: Place, name: str, spans: int, tokens: int, dim: int) -> Case:
    """Mean distance of all pairs of rows of every span."""
    count = max(1, int(spans * at.scale))
    x = at.values(count * tokens, dim)
    return Case(
        op="maxmin_select",
        name=name,
        call=lambda: kernels.mean_distance(x, spans=[tokens] * count),
        flops=8.0 * x.numel(),
        bytes=3.0 * x.numel() * x.element_size(),
    )


@prepared
def topk(at: Place, name: str, rows: int, tokens: int) -> Case:
    """Stable selection of the best quarter."""
    n = max(16, int(tokens * at.scale))
    scores = torch.rand(rows * n, device=at.device)
    return Case(
        op="topk_stable",
        name=name,
        call=lambda: kernels.topk_stable(scores, n // 4, spans=n),
        eager=lambda s: s.view(rows, n).topk(n // 4).indices.sort().values,
        arguments=(scores,),
        bytes=12 * rows * n,
    )


@prepared
def topk_spans(at: Place, name: str, lengths: list[int]) -> Case:
    """Stable selection of the best quarter of every span."""
    scores = torch.rand(sum(lengths), device=at.device)
    counts = [n // 4 for n in lengths]
    return Case(
        op="topk_stable",
        name=name,
        call=lambda: kernels.topk_stable(scores, counts, spans=lengths),
        flops=sum(n * n for n in lengths),
        bytes=12 * len(scores),
    )


def _rows(
    at: Place, spans: int, tokens: int, dim: int, keep: float
) -> tuple[int, int, int, torch.Tensor]:
    """Spans, rows of each, rows to keep of each, and all rows in fp32 whatever the dtype."""
    count = max(1, int(spans * at.scale)) if spans > 1 else 1
    length = max(16, int(tokens * at.scale)) if spans == 1 else tokens
    k = max(1, int(length * keep))
    x = case.random_values(count * length, dim, device=at.device, dtype=torch.float32)
    return count, length, k, x


@prepared
def dpp(at: Place, name: str, spans: int, tokens: int, dim: int, keep: float) -> Case:
    """Greedy selection by a determinantal point process; in fp32 whatever the dtype."""
    count, length, k, x = _rows(at, spans, tokens, dim, keep)
    relevance = torch.rand(len(x), device=at.device) + 0.1
    return Case(
        op="dpp_select",
        name=name,
        call=lambda: kernels.dpp_select(x, k, relevance, spans=length),
        flops=count * (2.0 * length**2 * dim + k * k * length),
        bytes=count * (4.0 * length * dim + 4 * length * (length + k)),
    )


@prepared
def facility(at: Place, name: str, spans: int, tokens: int, dim: int, keep: float) -> Case:
    """Greedy facility location over the rows themselves; in fp32 whatever the dtype."""
    count, length, k, x = _rows(at, spans, tokens, dim, keep)
    weights = torch.rand(len(x), device=at.device)
    return Case(
        op="facility_select",
        name=name,
        call=lambda: kernels.facility_select(x, k, weights, spans=length),
        flops=count * (2.0 * length**2 * dim + 3.0 * k * length**2),
        bytes=count * (4.0 * length * dim + 4 * length * length),
    )
