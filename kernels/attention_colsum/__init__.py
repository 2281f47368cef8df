"""Column sums of an attention matrix that is never stored."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError

HEADS = ("mean", "rms", "none")
# Rows of a block, and the most logits that it may have (16 MiB in fp32). On a CPU, blocks of this
# height stay in the cache between their passes and compute few logits that causality hides.
BLOCK_ROWS = 64
BLOCK_ELEMENTS = 1 << 22


def attention_colsum(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    causal: bool = True,
    heads: str = "mean",
    iterations: int = 1,
    trusted: bool = False,
) -> Tensor:
    r"""Compute the attention that every key receives from the probe rows.

    .. math:: out_j = \sum_i w_i \, \mathrm{softmax}(q_i \cdot k \; scale / temperature)_j

    per head, followed by the mean or the root mean square over heads. The softmax of row i runs
    over the keys that row i sees. No tensor of size rows × keys is stored.

    Parameters
    ----------
    q
        Queries of the probe rows after RoPE, ``(B, Hq, R, D)``. They belong to the last R keys, in
        order, unless `visible` says otherwise. The dtype is float16, bfloat16 or float32; the
        PyTorch path also accepts float64.
    k
        Keys after RoPE, ``(B, Hkv, N, D)`` as in a KV cache. Hq is a multiple of Hkv (grouped
        heads); dtype and device are those of `q`.
    row_weights
        Weights w of the rows: ``(R,)``, ``(B, R)`` or ``(B, Hq, R)``. None means that every weight
        is 1.
    visible
        What every row sees, for rows in any order, batches with padding, and sequences that are
        packed one after the other: int32 ``(3, B, R)``, the first key, the key after the last, and
        the key of the row (-1 for a padding row, which sees no key). It replaces `causal`.
    scale
        Factor of the logits. None means ``D ** -0.5``.
    temperature
        Softmax temperature τ > 0.
    causal
        If True, row i sees the keys up to its own; otherwise it sees all keys.
    heads
        ``"mean"``, ``"rms"`` or ``"none"`` (one result per query head).
    iterations
        How often s ← sM is applied per head, with one LSE pass for all repetitions; `row_weights`
        is the initial s. More than one iteration needs a probe row for every key (R = N).
    trusted
        Whether the caller knows that all tensors are right, `visible` contiguous and with keys of
        `k`. They are not checked then, and the host need not wait for the device to look at
        `visible`.

    Returns
    -------
    Tensor
        fp32 (fp64 for fp64 inputs), ``(B, N)``, or ``(B, Hq, N)`` for ``heads="none"``. Keys that
        no row sees have 0. The result is not differentiable.

    Raises
    ------
    KernelError
        If shapes, dtypes or devices do not fit together, if the head dimension is above 256
        (Triton), or if an option is out of range.

    Notes
    -----
    The cost is ``2·(1 + iterations)·B·Hq·R·N·D`` FLOPs (half of it if causal over all rows) and,
    for few rows, ``(1 + iterations)·B·Hkv·N·D·itemsize + 4·B·Hq·N`` bytes: each pass reads a key
    once for all heads of its group. The two streaming passes follow FlashAttention (arXiv
    2205.14135); the repeated application is the PageRank over attention of AIM (arXiv 2412.03248).
    """
    if not trusted:
        checks.heads(q=q, k=k)
        checks.same_device(q=q, k=k, row_weights=row_weights, visible=visible)
        if q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0]:
            raise KernelError(
                f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dimension"
            )
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise KernelError(
                f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads"
            )
    if heads not in HEADS:
        raise KernelError(f"heads={heads!r} is not known; allowed: {', '.join(HEADS)}")
    if not temperature > 0:
        raise KernelError(f"temperature must be above 0; got {temperature}")
    if iterations < 1 or (iterations > 1 and q.shape[2] != k.shape[2]):
        raise KernelError(
            f"iterations={iterations} with {q.shape[2]} rows and {k.shape[2]} keys: "
            "needs at least 1, and more than 1 needs one probe row per key"
        )
    weights = _row_weights(row_weights, q)
    known = visible.contiguous() if trusted and visible is not None else None
    seen = _visible(visible, q, k, causal) if known is None else known
    scale = (q.shape[3] ** -0.5 if scale is None else scale) / temperature
    out = _op(q, k, weights, seen, scale, iterations, trusted=trusted or visible is None)
    return out if heads == "none" else join_heads(out, heads)


def join_heads(out: Tensor, heads: str) -> Tensor:
    """Join what :func:`attention_colsum` gives for ``heads="none"``, ``(B, Hq, N)``.

    Returns ``(B, N)`` for ``heads="mean"`` and ``"rms"``, the input for ``"none"``. For callers
    whose heads come from several calls or processes.
    """
    if heads == "mean":
        return out.mean(1)
    if heads == "none":
        return out
    # The sums that a sharp softmax leaves are so small that their squares underflow to 0, which
    # would make all of these keys equal. Dividing by the largest head first avoids that.
    most = out.abs().amax(1).clamp(min=torch.finfo(out.dtype).tiny)
    return (out / most[:, None]).square().mean(1).sqrt() * most


def _visible(visible: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """What every row sees, contiguous; None: rows of the last R keys see their past, or all."""
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    if visible is not None:
        if visible.dtype != torch.int32 or visible.shape != (3, batch, rows):
            raise KernelError(
                f"visible must be int32 (3, {batch}, {rows}); got {visible.dtype} "
                f"{tuple(visible.shape)}"
            )
        return visible.contiguous()
    if causal and rows > keys:
        raise KernelError(f"{rows} probe rows but {keys} keys: pass visible to place the rows")
    key = torch.arange(rows, device=q.device, dtype=torch.int32) + max(0, keys - rows)
    # First key, key after the last, key of the row: (3, B, R). Two rows of four keys, causal:
    #     0 0 | 3 4 | 2 3
    visible = key.new_zeros(3, batch, rows)
    visible[1] = key + 1 if causal else keys
    visible[2] = key
    return visible


def _row_weights(value: Tensor | None, q: Tensor) -> Tensor:
    """Broadcast the weights of rows to ``(B, Hq, R)``."""
    shape, dtype = q.shape[:3], torch.float64 if q.dtype == torch.float64 else torch.float32
    if value is None:
        return torch.ones(shape, dtype=dtype, device=q.device)
    value = value.detach().to(dtype)
    # (B, R) -> (B, 1, R): one weight for all heads. (R,) broadcasts as it is.
    if value.dim() == 2:
        value = value[:, None]
    fault = f"row_weights {tuple(value.shape)} does not fit {tuple(shape)} probe rows"
    if value.dim() not in (1, 3) or value.shape[-1] != shape[2]:
        raise KernelError(fault)
    try:
        return value.expand(shape).contiguous()
    except RuntimeError as error:
        raise KernelError(fault) from error


def _check_values(q: Tensor, k: Tensor, weights: Tensor, visible: Tensor, *_: object) -> None:
    """Require that rows see keys of `k`."""
    good = ((visible[0] >= 0) & (visible[1] <= k.shape[2])).all()
    checks.holds(good, "visible keys must be keys of `k`")


def naive(
    q: Tensor, k: Tensor, weights: Tensor, visible: Tensor, scale: float, iterations: int
) -> Tensor:
    """Apply s ← sM `iterations` times to the weights s ``(B, Hq, R)``, in fp32 (fp64 for fp64).

    A matrix of rows × keys exists for one block of probe rows at a time. `visible` is int32
    ``(3, B, R)``: `lo`, `hi` and `key` in the functions below, whose `lse` is ``(B, Hq, R)``.
    """
    lo, hi, key = visible.unbind()
    # PageRank over causal attention: one probe row per key, and no row sees a later key.
    if iterations > 1 and is_triangular(hi, key):
        return causal_powers(q, k, weights, lo, hi, scale, iterations)
    return repeated(column_sums, attention_lse, q, k, weights, visible, scale, iterations)


def repeated(
    sums: Callable[..., Tensor],
    lse_of: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    visible: Tensor,
    scale: float,
    iterations: int,
) -> Tensor:
    """As :func:`naive`, with one pass of `sums` per application and one of `lse_of`."""
    lo, hi, key = visible.unbind()
    # The matrix is the same in all iterations, so its denominators are computed once.
    lse = lse_of(q, k, lo, hi, scale) if iterations > 1 else None
    out = sums(q, k, weights, lo, hi, lse, scale)
    for _ in range(iterations - 1):
        # The result is per key, the next weights are per row: row i takes the value of its key.
        # Padding rows (key -1) read key 0, which the mask turns into 0.
        at = key.clamp(min=0).long()[:, None].expand_as(weights)
        weights = out.gather(2, at).masked_fill_(key[:, None] < 0, 0.0)
        out = sums(q, k, weights, lo, hi, lse, scale)
    return out


def column_sums(
    q: Tensor, k: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, lse: Tensor | None, scale: float
) -> Tensor:
    """Compute the column sums of every query head, ``(B, Hq, N)``."""
    out = weights.new_zeros(*q.shape[:2], k.shape[2])
    for rows, columns, logits in _blocks(q, k, lo, hi, scale):
        norm = logits.logsumexp(-1) if lse is None else lse[:, :, rows].to(logits.dtype)
        # A row without a visible key has lse -inf, and exp(-inf + inf) would be NaN. With +inf its
        # probabilities exp(-inf - inf) are 0. A NaN stays and reaches the result.
        norm = torch.where(norm.isinf(), torch.inf, norm)
        probabilities = logits.sub_(norm[..., None]).exp_()
        weighted = weights[:, :, None, rows].to(logits.dtype) @ probabilities
        out[:, :, columns] += weighted.squeeze(2)
    return out


def attention_lse(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """Compute the log-sum-exp of every row's visible logits, ``(B, Hq, R)``.

    The value is -inf where a row sees no key.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for rows, _, logits in _blocks(q, k, lo, hi, scale):
        out[:, :, rows] = logits.logsumexp(-1)
    return out


def is_triangular(hi: Tensor, key: Tensor) -> bool:
    """Whether row i belongs to key i and sees no later key, as :func:`causal_powers` requires."""
    index = torch.arange(hi.shape[1], device=hi.device, dtype=hi.dtype)
    return bool(((key == index) | (key < 0)).all()) and bool((hi <= index + 1).all())


# Two steps over M of 4 rows and keys in blocks of 2, from the last block of rows to the first:
#              keys   0  1 | 2  3
#     rows 2, 3      d  d | c  c     c: s1, then s2 at keys 2 and 3; final: no row follows
#                                    d: adds s0 and s1 of rows 2 and 3 to s1 and s2 at keys 0 and 1
#     rows 0, 1      a  a | -  -     a: s1, then s2 at keys 0 and 1; s1 already has the part of d
def causal_powers(
    q: Tensor, k: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, scale: float, steps: int
) -> Tensor:
    """Apply s ← sM `steps` times in one sweep over a lower triangular M; result ``(B, Hq, N)``.

    Entry j of the next s depends only on rows i ≥ j. A walk from the last block of rows to the
    first therefore knows every power of s within a block before it adds any of them to earlier
    columns, and computes M once instead of once per step. This algorithm is ours.
    """
    powers = weights.new_zeros(steps + 1, *q.shape[:2], k.shape[2])
    powers[0] = weights
    for rows, columns, logits in _blocks(q, k, lo, hi, scale, backwards=True):
        # (B, Hq, rows, columns); the softmax of a row without visible keys is NaN and becomes 0.
        matrix = torch.softmax(logits, -1, out=logits)
        empty = (hi <= lo)[:, rows]
        if bool(empty.any()):
            matrix.masked_fill_(empty[:, None, :, None], 0.0)
        # Columns from `first` on belong to this block of rows, earlier ones to blocks that follow
        # in the walk. Columns of the block need the powers in order, as each step reads the last;
        # the earlier columns take all steps in one product. All columns are earlier ones where the
        # rows see no key of their block.
        first = min(max(rows.start - columns.start, 0), matrix.shape[-1])
        own = slice(columns.start + first, columns.stop)
        for step in range(steps):
            spread = powers[step][:, :, None, rows] @ matrix[..., first:]
            powers[step + 1][:, :, own] += spread.squeeze(2)
        if first:
            # (B, Hq, steps, rows) @ (B, Hq, rows, columns): the steps are rows of one product.
            earlier = powers[:-1, :, :, rows].permute(1, 2, 0, 3) @ matrix[..., :first]
            powers[1:, :, :, columns.start : own.start] += earlier.permute(2, 0, 1, 3)
    return powers[-1]


def _blocks(
    q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float, backwards: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield row slice, column slice and masked logits ``(B, Hq, rows, columns)`` of all blocks.

    The column slice covers the keys that any row of the block sees. Blocks in which no row sees a
    key are left out. All blocks have their logits in the same memory, one after the other: fresh
    memory for each would take a CPU about as long as the product that fills it.
    """
    batch, heads, total, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(dtype)
    size = min(BLOCK_ROWS, max(1, BLOCK_ELEMENTS // max(1, batch * heads * keys)))
    memory = torch.empty(batch * heads * size * keys, dtype=dtype, device=q.device)
    starts = range(0, total, size)
    for first in reversed(starts) if backwards else starts:
        rows = slice(first, min(first + size, total))
        low, high = lo[:, rows], hi[:, rows]
        seen = high > low
        if not bool(seen.any()):
            continue
        # Under a causal mask, keys after the last row of the block are not multiplied at all.
        begin, end = int(low[seen].min()), int(high[seen].max())
        block = q[:, :, rows].to(dtype) * scale
        # Query heads of a group are consecutive: (B, Hkv, group · rows, D).
        block = block.reshape(batch, kv_heads, -1, dim)
        shape = (batch, kv_heads, block.shape[2], end - begin)
        logits = memory[: math.prod(shape)].view(shape)
        torch.matmul(block, k[:, :, begin:end].transpose(-1, -2), out=logits)
        logits = logits.view(batch, heads, -1, end - begin)
        # If all rows begin at the same key, every row sees the columns before `shared`, and only
        # the columns from there on need a mask.
        shared = begin if int(low.max()) > begin else min(max(int(high.min()), begin), end)
        if shared < end:
            column = torch.arange(shared, end, device=q.device)
            hidden = (column < low[..., None]) | (column >= high[..., None])
            logits[..., shared - begin :].masked_fill_(hidden[:, None], -torch.inf)
        yield rows, slice(begin, end), logits


_op = dispatch.Op(
    "attention_colsum",
    naive,
    lambda q, k, *_: q.new_empty(
        (*q.shape[:2], k.shape[2]), dtype=torch.promote_types(q.dtype, torch.float32)
    ),
    _check_values,
)
