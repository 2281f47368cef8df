"""What is benchmarked: one setup function per op, at sizes of real models.

Each setup returns a :class:`Case`: a call of the public function, the straightforward PyTorch
version of the same thing (``eager``: whole matrices, no blocking; also what ``torch.compile``
gets), and the bytes and FLOPs that the op cannot avoid. ``scale`` shrinks the large dimension for
runs without a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencomp import kernels


@dataclass
class Case:
    """One op at one size."""

    op: str
    name: str
    call: Callable[[], Any]
    eager: Callable[..., Any] | None
    arguments: tuple[Any, ...]  # of `eager`
    flops: float
    bytes: float
    tensor_cores: bool
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)


Setup = Callable[[torch.device, torch.dtype, float], Case]
# Long spans in max-min selection: candidates of a round, and how many it chooses in the worst case
# that `tests/kernels/test_maxmin_rounds.py` counts, a video of 64 frames that stands still. Where
# things move it is several times as many.
CANDIDATES, CHOICES = 2048, 60


def colsum(
    name: str, rows: int, keys: int, heads: int, kv_heads: int, dim: int, iterations: int = 1
) -> Setup:
    """Attention column sums; ``rows=0``: one row per key."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        n = max(64, int(keys * scale))
        r = rows or n
        q = _random(1, heads, r, dim, device=device, dtype=dtype)
        k = _random(1, kv_heads, n, dim, device=device, dtype=dtype)
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
            tensor_cores=dtype != torch.float32,
            others=_colreduce(q, k, causal) if iterations == 1 else {},
        )

    return setup


def match(name: str, frames: int, tokens: int, dim: int) -> Setup:
    """Bipartite matching within frames."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        f = max(1, int(frames * scale))
        x = _random(f * tokens, dim, device=device, dtype=dtype)

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
            tensor_cores=dtype != torch.float32,
        )

    return setup


def nearest(name: str, frames: int, side: int, dim: int, radius: int) -> Setup:
    """Similarity to the previous frame."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        f = max(2, int(frames * scale))
        x = _random(f, side, side, dim, device=device, dtype=dtype)
        tokens = f * side * side

        def eager(x: Tensor) -> Tensor:
            return F.cosine_similarity(x[1:].float(), x[:-1].float(), dim=-1)

        return Case(
            op="nearest_previous_frame",
            name=name,
            call=lambda: kernels.nearest_previous_frame(x, radius),
            eager=eager if radius == 0 else None,
            arguments=(x,),
            flops=6 * tokens * dim * (2 * radius + 1) ** 2,
            bytes=x.numel() * x.element_size() + 12 * tokens,
            tensor_cores=False,
        )

    return setup


def merge(name: str, frames: int, tokens: int, dim: int) -> Setup:
    """Half of the rows of every frame merge into the other half."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        f = max(1, int(frames * scale))
        n = f * tokens
        x = _random(n, dim, device=device, dtype=dtype)
        target = torch.arange(n, device=device)
        even = target[::2]
        target[::2] = even - even % tokens + 2 * ((even * 7) % (tokens // 2)) + 1
        keep = torch.arange(1, n, 2, device=device)
        sizes = torch.ones(n, device=device)
        positions = torch.arange(n, device=device).expand(3, n)

        def eager(x: Tensor) -> Tensor:
            total = x.new_zeros(len(keep), dim, dtype=torch.float32)
            total.index_add_(0, target // 2, x.float())
            count = torch.bincount(target // 2, minlength=len(keep))
            return (total / count[:, None]).to(x.dtype)

        return Case(
            op="merge_rows",
            name=name,
            call=lambda: kernels.merge_rows(
                x, target, keep, sizes, frames=tokens, positions=positions
            ),
            eager=eager,
            arguments=(x,),
            flops=2 * n * dim,
            bytes=(n + len(keep)) * dim * x.element_size() + 40 * n,
            tensor_cores=False,
        )

    return setup


def gather(name: str, batch: int, tokens: int, dim: int, kv_heads: int, head_dim: int) -> Setup:
    """Hidden states, cos, sin, mask, M-RoPE positions, K, V of a layer; half of the rows stay."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        n = max(8, int(tokens * scale))
        hidden = _random(batch, n, dim, device=device, dtype=dtype)
        cos, sin = (_random(batch, n, head_dim, device=device, dtype=dtype) for _ in range(2))
        key, value = (
            _random(batch, kv_heads, n, head_dim, device=device, dtype=dtype) for _ in range(2)
        )
        mask = torch.ones(batch, n, dtype=torch.bool, device=device)
        positions = torch.arange(n, device=device).expand(3, batch, n)
        index = torch.arange(0, n, 2, device=device).expand(batch, -1).contiguous()
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
            flops=0,
            bytes=2 * moved,
            tensor_cores=False,
        )

    return setup


def pool(name: str, frames: int, side: int, dim: int, mode: str) -> Setup:
    """One frame in four stays whole, the others lose half of each side."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        f = max(4, int(frames * scale))
        x = _random(f, side, side, dim, device=device, dtype=dtype)
        half = (side + 1) // 2
        grids = [(side, side) if i % 4 == 0 else (half, half) for i in range(f)]

        def eager(x: Tensor) -> Tensor:
            parts = []
            for frame, grid in zip(x, grids, strict=True):
                image = frame.permute(2, 0, 1)[None].float()
                image = F.interpolate(image, grid, mode=mode)
                parts.append(image[0].permute(1, 2, 0).flatten(0, 1).to(x.dtype))
            return torch.cat(parts)

        tokens = sum(h * w for h, w in grids)
        return Case(
            op="frame_pool",
            name=name,
            call=lambda: kernels.frame_pool(x, grids, mode),
            eager=eager,
            arguments=(x,),
            flops=x.numel() if mode == "area" else 7 * tokens * dim,
            bytes=(x.numel() + tokens * dim) * x.element_size(),
            tensor_cores=False,
        )

    return setup


def ccam(name: str, queries: int, frames: int, tokens: int, heads: int, dim: int) -> Setup:
    """Causal cross-attention to frames."""

    def setup(device: torch.device, dtype: torch.dtype, scale: float) -> Case:
        f = max(2, int(frames * scale))
        n = f * tokens
        q = _random(1, heads, queries, dim, device=device, dtype=dtype)
        k, v = (_random(1, heads, n, dim, device=device, dtype=dtype) for _ in range(2))

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
            tensor_cores=dtype != torch.float32,
        )

    return setup


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
        x = _random(count * length, dim, device=device, dtype=dtype)
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
        x = _random(count * tokens, dim, device=device, dtype=dtype)
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
    nearest("32 frames x 14 x 14 x 3584, same place", 32, 14, 3584, 0),
    nearest("32 frames x 14 x 14 x 3584, 3 x 3 window", 32, 14, 3584, 1),
    merge("32 frames x 196 tokens x 3584, half kept", 32, 196, 3584),
    gather("7B layer, 8k rows, half kept", 1, 8192, 3584, 4, 128),
    gather("0.5B layer, 4 x 8k rows, half kept", 4, 8192, 896, 2, 64),
    pool("128 frames x 14 x 14 x 3584, area", 128, 14, 3584, "area"),
    pool("64 frames x 27 x 27 x 3584, bilinear", 64, 27, 3584, "bilinear"),
    ccam("1024 queries x 96 frames of 729, 16 heads of 64", 1024, 96, 729, 16, 64),
    ccam("1024 queries x 32 frames of 729, 9 heads of 128", 1024, 32, 729, 9, 128),
    maxmin("32 spans x 196 tokens x 3584, a quarter kept", 32, 196, 3584, 0.25, False),
    maxmin("1 span x 6272 tokens x 3584, a quarter kept", 1, 6272, 3584, 0.25, True),
    maxmin("1 span x 16384 tokens x 3584, 5 % kept", 1, 16384, 3584, 0.05, False),
    topk("8 x 8k scores", 8, 8192),
]


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


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
