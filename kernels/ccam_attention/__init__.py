"""Cross-attention of queries to the frames of a video with a causal mask over frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError

__all__ = ["ccam_attention", "visible_frames"]


def ccam_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: int,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    r"""Softmax attention in which query i of Q sees the first ``floor(i·F/Q) + 1`` of F frames.

    The mask follows from indices (:func:`visible_frames`), so it is never stored, and key blocks
    that no query of a block sees are never read. Finite values that a query does not see leave the
    bits of its result unchanged. Frames that no query sees may hold any values.

    Parameters
    ----------
    q
        Queries ``(B, H, Q, D)``.
    k, v
        Keys and values ``(B, H, F·P, D)`` with P tokens per frame, frames one after the other.
    frames
        F, of which the number of keys is a multiple; 0 if there are none.
    causal
        If False, every query sees every frame.
    scale
        Factor of the logits. None means ``D ** -0.5``.

    Returns
    -------
    Tensor
        Attention output ``(B, H, Q, D)`` in the dtype of `q`; 0 without frames.

    Raises
    ------
    KernelError
        If shapes, dtypes or devices do not fit together, or if the number of keys is not a
        multiple of the number of frames.

    Notes
    -----
    The cost is ``4·B·H·Q·F·P·D`` FLOPs (about half if causal) and ``2·B·H·(Q + F·P)·D·itemsize``
    bytes. The function is differentiable: if a gradient is needed, PyTorch's attention runs instead
    of the Triton kernel. The mask follows Video-CCAM (arXiv 2408.14023).
    """
    checks.heads(q=q, k=k, v=v)
    checks.same_device(q=q, k=k, v=v)
    batch, heads, _, dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != dim:
        raise KernelError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    checks.int32_sizes(**{"queries x frames": q.shape[2] * frames})
    per_frame = k.shape[2] // frames if frames > 0 else 0
    if frames < 0 or k.shape[2] != per_frame * frames:
        raise KernelError(f"{k.shape[2]} keys are not a multiple of {frames} frames")
    # Videos without frames, and frames without tokens: a softmax over no keys would be NaN.
    if per_frame == 0:
        return torch.zeros_like(q)
    scale = dim**-0.5 if scale is None else scale
    return _op(q, k, v, frames, per_frame, causal, scale)


# Four queries, and three or seven frames (x: visible):
#     query 0    x . .      x . . . . . .
#     query 1    x . .      x x . . . . .
#     query 2    x x .      x x x x . . .
#     query 3    x x x      x x x x x x .     no query sees the last ⌈7/4⌉ - 1 = 1 frame
# `runs` of the first: queries 0 and 1 see one frame, query 2 two, query 3 three.
def visible_frames(query: int, queries: int, frames: int) -> int:
    """Return how many frames, from the first on, query `query` sees: ``floor(i·F/Q) + 1``.

    The mask is block lower-triangular, and a single frame is visible to all queries. If there are
    at least as many queries as frames, the last query sees every frame; otherwise no query sees the
    last ⌈F/Q⌉ - 1 frames. This is our reconstruction of the rule of Video-CCAM (arXiv 2408.14023).
    """
    return min(frames, query * frames // queries + 1)


def runs(queries: int, frames: int) -> list[tuple[int, int, int]]:
    """Group consecutive queries that see the same frames.

    Returns
    -------
    list of tuple
        ``(first query, last query + 1, number of visible frames)`` per group, in order.
    """
    groups: list[tuple[int, int, int]] = []
    for query in range(queries):
        visible = visible_frames(query, queries, frames)
        if groups and groups[-1][2] == visible:
            groups[-1] = (groups[-1][0], query + 1, visible)
        else:
            groups.append((query, query + 1, visible))
    return groups


def naive(
    q: Tensor, k: Tensor, v: Tensor, frames: int, per_frame: int, causal: bool, scale: float
) -> Tensor:
    """Attend with one call of SDPA, without a mask, per group of queries that see the same frames.

    Shapes are those of :func:`tokencomp.kernels.ccam_attention`, and `per_frame`, above 0, is the
    number of keys of a frame.
    """
    queries, parts = q.shape[2], []
    for first, end, seen in runs(queries, frames) if causal else [(0, queries, frames)]:
        # Visible frames are a prefix of the keys, so a slice replaces the mask.
        keys = seen * per_frame
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, first:end], k[:, :, :keys], v[:, :, :keys], scale=scale
            )
        )
    return torch.cat(parts, dim=2).contiguous()


_op = dispatch.Op("ccam_attention", naive, lambda q, *_: q.new_empty(q.shape), differentiable=True)
