"""Benchmarks of kernels that match, merge, gather and pool rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Place, prepared
from tokencomp import kernels


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
