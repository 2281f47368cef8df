"""What is benchmarked: one setup function per op, at sizes of real models.

Each setup returns a :class:`~Case`: a call of the public function, the
straightforward PyTorch version of the same thing (``eager``: whole matrices, no blocking; also what
``torch.compile`` gets), and the bytes and FLOPs that the op cannot avoid. ``scale`` shrinks the
large dimension for runs without a GPU.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencomp import kernels

OPS = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)


@dataclass
class Case:
    """One op at one size."""

    op: str
    name: str
    call: Callable[[], Any]
    bytes: float
    flops: float = 0
    eager: Callable[..., Any] | None = None  # None for loops in Python: the naive provider has them
    arguments: tuple[Any, ...] = ()  # of `eager`
    tensor_cores: bool = False
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)


Setup = Callable[[torch.device, torch.dtype, float], Case]


class Place(NamedTuple):
    """Where a case runs, and at what share of its sizes."""

    device: torch.device
    dtype: torch.dtype
    scale: float

    def values(self, *shape: int) -> Tensor:
        return random_values(*shape, device=self.device, dtype=self.dtype)


def prepared(make: Callable[..., Case]) -> Callable[..., Setup]:
    """Turn `make(place, ...)` into a function of all other arguments, which returns a `Setup`."""
    return lambda *sizes, **options: lambda *place: make(Place(*place), *sizes, **options)


def random_values(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


@prepared
def colsum(
    at: Place,
    name: str,
    rows: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    iterations: int = 1,
) -> Case:
    """Attention column sums; ``rows=0``: one row per key."""
    n = max(64, int(keys * at.scale))
    r = rows or n
    q = at.values(1, heads, r, dim)
    k = at.values(1, kv_heads, n, dim)
    causal = r == n
    pairs = r * n * (0.5 if causal else 1.0)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        logits = (q @ k.transpose(-1, -2)).float() * dim**-0.5
        if causal:
            mask = torch.ones(r, n, dtype=torch.bool, device=q.device).tril()
            logits = logits.masked_fill(~mask, -torch.inf)
        matrix = logits.softmax(-1)
        weights = matrix.new_ones(1, heads, 1, r)
        for _ in range(iterations):
            weights = weights @ matrix
        return weights[:, :, 0].mean(1)

    item = q.element_size()
    passes = 1 + iterations
    return Case(
        op="attention_colsum",
        name=name,
        call=lambda: kernels.attention_colsum(q, k, causal=causal, iterations=iterations),
        eager=eager,
        arguments=(q, k),
        flops=2 * passes * heads * pairs * dim,
        bytes=passes * (kv_heads * n + heads * r) * dim * item + 4 * heads * n,
        tensor_cores=at.dtype != torch.float32,
        others=_colreduce(q, k, causal) if iterations == 1 else {},
    )


@prepared
def ccam(
    at: Place, name: str, queries: int, frames: int, tokens: int, heads: int, dim: int
) -> Case:
    """Causal cross-attention to frames."""
    f = max(2, int(frames * at.scale))
    n = f * tokens
    q = at.values(1, heads, queries, dim)
    k, v = (at.values(1, heads, n, dim) for _ in range(2))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(queries, device=q.device) * f // queries + 1
        mask = torch.arange(n, device=q.device) < (seen * tokens)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    visible = sum(kernels.visible_frames(i, queries, f) for i in range(queries)) * tokens
    return Case(
        op="ccam_attention",
        name=name,
        call=lambda: kernels.ccam_attention(q, k, v, f),
        eager=eager,
        arguments=(q, k, v),
        flops=4 * heads * visible * dim,
        bytes=2 * heads * (queries + n) * dim * q.element_size(),
        tensor_cores=at.dtype != torch.float32,
    )


def _colreduce(q: Tensor, k: Tensor, causal: bool) -> dict[str, Callable[[], Any]]:
    """The public two-pass kernel, where it is installed."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        return {}
    group = q.shape[1] // k.shape[1]
    wide = k.repeat_interleave(group, dim=1) if group > 1 else k

    def call() -> Tensor:
        return flash_colreduce(q, wide, reduction="sum", is_causal=causal).mean(1)

    return {"flash-colreduce": call}


@prepared
def match(at: Place, name: str, frames: int, tokens: int, dim: int) -> Case:
    """Bipartite matching within frames."""
    f = max(1, int(frames * at.scale))
    x = at.values(f * tokens, dim)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(x.view(f, tokens, dim).float(), dim=-1)
        best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        return best.values, best.indices

    return Case(
        op="bipartite_match",
        name=name,
        call=lambda: kernels.bipartite_match(x, tokens),
        eager=eager,
        arguments=(x,),
        flops=f * tokens * tokens * dim / 2,
        bytes=x.numel() * x.element_size() + 12 * len(x),
        tensor_cores=at.dtype != torch.float32,
    )


@prepared
def nearest(at: Place, name: str, frames: int, side: int, dim: int) -> Case:
    """Similarity to the previous frame."""
    f = max(2, int(frames * at.scale))
    x = at.values(f, side, side, dim)
    tokens = f * side * side

    def eager(x: Tensor) -> Tensor:
        return F.cosine_similarity(x[1:].float(), x[:-1].float(), dim=-1)

    return Case(
        op="nearest_previous_frame",
        name=name,
        call=lambda: kernels.nearest_previous_frame(x),
        eager=eager,
        arguments=(x,),
        flops=6 * tokens * dim,
        bytes=x.numel() * x.element_size() + 4 * tokens,
    )


@prepared
def merge(at: Place, name: str, frames: int, tokens: int, dim: int) -> Case:
    """Half of the rows of every frame merge into the other half."""
    f = max(1, int(frames * at.scale))
    n = f * tokens
    x = at.values(n, dim)
    target = torch.arange(n, device=at.device)
    even = target[::2]
    target[::2] = even - even % tokens + 2 * ((even * 7) % (tokens // 2)) + 1
    keep = torch.arange(1, n, 2, device=at.device)
    sizes = torch.ones(n, device=at.device)

    def eager(x: Tensor) -> Tensor:
        total = x.new_zeros(len(keep), dim, dtype=torch.float32)
        total.index_add_(0, target // 2, x.float())
        count = torch.bincount(target // 2, minlength=len(keep))
        return (total / count[:, None]).to(x.dtype)

    return Case(
        op="merge_rows",
        name=name,
        call=lambda: kernels.merge_rows(x, target, keep, sizes, frames=tokens),
        eager=eager,
        arguments=(x,),
        flops=2 * n * dim,
        bytes=(n + len(keep)) * dim * x.element_size() + 18 * n,
    )


@prepared
def gather(
    at: Place, name: str, batch: int, tokens: int, dim: int, kv_heads: int, head_dim: int
) -> Case:
    """Hidden states, cos, sin, mask, M-RoPE positions, K, V of a layer; half of the rows stay."""
    n = max(8, int(tokens * at.scale))
    hidden = at.values(batch, n, dim)
    cos, sin = (at.values(batch, n, head_dim) for _ in range(2))
    key, value = (at.values(batch, kv_heads, n, head_dim) for _ in range(2))
    mask = torch.ones(batch, n, dtype=torch.bool, device=at.device)
    positions = torch.arange(n, device=at.device).expand(3, batch, n)
    index = torch.arange(0, n, 2, device=at.device).expand(batch, -1).contiguous()
    tensors = [hidden, cos, sin, mask, positions, key, value]
    seq, batches = [1, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 0, 0]

    def eager(*tensors: Tensor) -> list[Tensor]:
        out = []
        for tensor, dim, place in zip(tensors, seq, batches, strict=True):
            shape = [1] * tensor.dim()
            shape[place], shape[dim] = index.shape
            full = list(tensor.shape)
            full[dim] = index.shape[1]
            out.append(tensor.gather(dim, index.view(shape).expand(full)))
        return out

    moved = sum(t.numel() // n * index.shape[1] * t.element_size() for t in tensors)
    return Case(
        op="gather_rows",
        name=name,
        call=lambda: kernels.gather_rows(tensors, index, seq, batches),
        eager=eager,
        arguments=tuple(tensors),
        bytes=2 * moved,
    )


@prepared
def pool(at: Place, name: str, frames: int, side: int, dim: int) -> Case:
    """One frame in four stays whole, the others lose half of each side."""
    f = max(4, int(frames * at.scale))
    x = at.values(f, side, side, dim)
    half = (side + 1) // 2
    grids = [(side, side) if i % 4 == 0 else (half, half) for i in range(f)]

    def eager(x: Tensor) -> Tensor:
        parts = []
        for frame, grid in zip(x, grids, strict=True):
            image = frame.permute(2, 0, 1)[None].float()
            image = F.adaptive_avg_pool2d(image, grid)
            parts.append(image[0].permute(1, 2, 0).flatten(0, 1).to(x.dtype))
        return torch.cat(parts)

    tokens = sum(h * w for h, w in grids)
    return Case(
        op="frame_pool",
        name=name,
        call=lambda: kernels.frame_pool(x, grids),
        eager=eager,
        arguments=(x,),
        flops=x.numel(),
        bytes=(x.numel() + tokens * dim) * x.element_size(),
    )


# Long spans in max-min selection: candidates of a round, and how many it chooses in the worst case
# that `tests/kernels/test_maxmin.py` counts, a still video of 64 frames. Where
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
    x = random_values(count * length, dim, device=at.device, dtype=torch.float32)
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


CASES: list[Setup] = [
    colsum("1 row x 16k keys, 28/4 heads of 128", 1, 16384, 28, 4, 128),
    colsum("16 rows x 16k keys, 28/4 heads of 128", 16, 16384, 28, 4, 128),
    colsum("64 rows x 16k keys, 28/4 heads of 128", 64, 16384, 28, 4, 128),
    colsum("64 rows x 16k keys, 14/2 heads of 64", 64, 16384, 14, 2, 64),
    colsum("64 rows x 16k keys, 32/32 heads of 80", 64, 16384, 32, 32, 80),
    colsum("8k rows x 8k keys causal, 28/4 heads of 128", 0, 8192, 28, 4, 128),
    colsum("PageRank, 5 steps, 8k x 8k causal, 28/4 heads of 128", 0, 8192, 28, 4, 128, 5),
    match("32 frames x 196 tokens x 3584", 32, 196, 3584),
    match("32 frames x 196 tokens x 896", 32, 196, 896),
    match("8 tiles x 729 tokens x 3584", 8, 729, 3584),
    nearest("32 frames x 14 x 14 x 3584, same place", 32, 14, 3584),
    merge("32 frames x 196 tokens x 3584, half kept", 32, 196, 3584),
    gather("7B layer, 8k rows, half kept", 1, 8192, 3584, 4, 128),
    gather("0.5B layer, 4 x 8k rows, half kept", 4, 8192, 896, 2, 64),
    pool("128 frames x 14 x 14 x 3584", 128, 14, 3584),
    pool("64 frames x 27 x 27 x 3584", 64, 27, 3584),
    ccam("1024 queries x 96 frames of 729, 16 heads of 64", 1024, 96, 729, 16, 64),
    ccam("1024 queries x 32 frames of 729, 9 heads of 128", 1024, 32, 729, 9, 128),
    maxmin("32 spans x 196 tokens x 3584, a quarter kept", 32, 196, 3584, 0.25),
    maxmin("1 span x 6272 tokens x 3584, a quarter kept", 1, 6272, 3584, 0.25),
    maxmin("1 span x 16384 tokens x 3584, 5 % kept", 1, 16384, 3584, 0.05),
    dpp("16 spans x 576 tokens x 3584, a quarter kept", 16, 576, 3584, 0.25),
    dpp("1 span x 4096 tokens x 3584, a tenth kept", 1, 4096, 3584, 0.1),
    facility("16 spans x 576 tokens x 3584, a quarter kept", 16, 576, 3584, 0.25),
    topk("8 x 8k scores", 8, 8192),
    topk_spans("16 spans of 576 and 729 scores", [576, 729] * 8),
]
