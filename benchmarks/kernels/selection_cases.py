"""Benchmarks of kernels that select rows."""

import torch

from benchmarks.kernels import case
from benchmarks.kernels.case import Case, Setup
from tokencomp import kernels

# Long spans in max-min selection: candidates of a round, and how many it chooses in the worst case
# that `tests/kernels/test_maxmin_rounds.py` counts, a video of 64 frames that stands still. Where
# things move it is several times as many.
CANDIDATES, CHOICES = 2048, 60


def maxmin(
    name: str,
    spans: int,
    tokens: int,
    dim: int,
    keep: float,
    centred: bool = False,
    metric: str = "cosine",
    start: str | None = None,
) -> Setup:
    """Greedy max-min selection."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        length = max(16, int(tokens * scale)) if spans == 1 else tokens
        count = max(1, int(spans * scale)) if spans > 1 else 1
        k = max(1, int(length * keep))
        x = case.random_values(count * length, dim, device=device, dtype=dtype)
        weights = torch.rand(len(x), device=device)
        margin = torch.full((count,), 0.02, device=device)
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
                centred=centred,
                margin=margin,
                metric=metric,
                start=start,
            ),
            eager=None,  # a loop of k steps in Python: that is the naive provider
            arguments=(),
            flops=count * 2.0 * products * dim,
            bytes=count * moved,
            tensor_cores=dtype != torch.float32 and metric == "cosine",
        )

    return setup


def mean_distance(name: str, spans: int, tokens: int, dim: int, centred: bool) -> Setup:
    """Mean distance of all pairs of rows of every span."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        count = max(1, int(spans * scale))
        x = case.random_values(count * tokens, dim, device=device, dtype=dtype)
        return Case(
            op="maxmin_select",
            name=name,
            call=lambda: kernels.mean_distance(x, centred, spans=[tokens] * count),
            eager=None,
            arguments=(),
            flops=8.0 * x.numel(),
            bytes=3.0 * x.numel() * x.element_size(),
            tensor_cores=False,
        )

    return setup


def topk(name: str, rows: int, tokens: int) -> Setup:
    """Stable selection of the best quarter."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        n = max(16, int(tokens * scale))
        scores = torch.rand(rows, n, device=device)
        return Case(
            op="topk_stable",
            name=name,
            call=lambda: kernels.topk_stable(scores, n // 4),
            eager=lambda s: s.topk(n // 4).indices.sort().values,
            arguments=(scores,),
            flops=0,
            bytes=12 * rows * n,
            tensor_cores=False,
        )

    return setup


def topk_spans(name: str, lengths: list[int]) -> Setup:
    """Stable selection of the best quarter of every span."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        scores = torch.rand(sum(lengths), device=device)
        counts = [n // 4 for n in lengths]
        return Case(
            op="topk_stable",
            name=name,
            call=lambda: kernels.topk_stable(scores, counts, spans=lengths),
            eager=None,
            arguments=(),
            flops=sum(n * n for n in lengths),
            bytes=12 * len(scores),
            tensor_cores=False,
        )

    return setup


def dpp(name: str, spans: int, tokens: int, dim: int, keep: float) -> Setup:
    """Greedy selection by a determinantal point process; in fp32 whatever the dtype."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        count = max(1, int(spans * scale)) if spans > 1 else 1
        length = max(16, int(tokens * scale)) if spans == 1 else tokens
        k = max(1, int(length * keep))
        x = case.random_values(count * length, dim, device=device, dtype=torch.float32)
        relevance = torch.rand(len(x), device=device) + 0.1
        return Case(
            op="dpp_select",
            name=name,
            call=lambda: kernels.dpp_select(x, k, relevance, spans=length),
            eager=None,  # a loop of k steps in Python: that is the naive provider
            arguments=(),
            flops=count * (2.0 * length**2 * dim + k * k * length),
            bytes=count * (4.0 * length * dim + 4 * length * (length + k)),
            tensor_cores=False,
        )

    return setup
