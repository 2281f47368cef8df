"""Small cases of every op, for the tests and for the check of a card (`prove`).

Rows, features and keys of a case end inside of a tile, and there are ties where the op ranks. A
case lowers limits of the op's Triton module where a small input would not take the long path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencomp import kernels


class Case(NamedTuple):
    """Shape of the main operand `x`, and a call that puts all others on the device of `x`."""

    shape: tuple[int, ...]
    call: Callable[[Tensor], Any]
    limits: tuple[tuple[str, int], ...] = ()
    """What to lower in the op's Triton module, so that a small input takes the long path."""


def visible(x: Tensor, rows: int, window: int) -> Tensor:
    """What the last rows of two left-padded samples see, those first that are in the middle.

    One is a padding row.
    """
    begin, keys = torch.tensor([[0], [9]]), x.shape[2]
    own = (torch.arange(rows) + torch.tensor([[21], [48]])) % rows + keys - rows
    low = torch.maximum(own - window + 1, begin)
    own[0, 3], low[0, 3] = -1, 0
    return torch.stack([low, own + 1, own]).int().to(x.device)


def colsum(x: Tensor, rows: int, window: int = 300, **options: Any) -> Tensor:
    """Two query heads of different content for every key head."""
    q = torch.cat([x, 2 * x.flip(1)], 1)[:, :, -rows:]
    how = {"row_weights": torch.arange(1.0, rows + 1, device=x.device), "heads": "none"}
    seen = visible(x, rows, window)
    return kernels.attention_colsum(q, x, visible=seen, **{**how, **options})


def layer(x: Tensor) -> Any:
    """Tensors of a layer, among them masks, positions, strided, wide and sequence-first ones."""
    index = torch.tensor([[0, 3, -1, 11], [5, 5, 2, -1]], device=x.device)
    heads = x.view(2, 12, 2, 10).transpose(1, 2)
    tensors = [x, x > 0, (9 * x).int(), x[:1], x.bfloat16(), heads, torch.stack([heads, -heads])]
    tensors += [x.transpose(0, 1), x[..., 0], torch.cat([x] * 8, 2)]
    seqs, batches = [1, -2, 1, 1, 1, -2, 3, 0, 1, 1], [0, -3, 0, 0, 0, 0, 1, 1, 0, 0]
    return kernels.gather_rows(tensors, index, seqs, batches)


def merged(x: Tensor, **options: Any) -> Any:
    """Rows merge into the next multiple of 7 below, and every fifth of the others is dropped."""
    row = torch.arange(len(x), device=x.device)
    target = torch.where((row % 5 == 1) & (row % 7 != 0), -1, row // 7 * 7)
    return kernels.merge_rows(x, target, row[::7], 1 + row % 3, **options)


def match(x: Tensor) -> Any:
    """Odd rows 1 and 139, farther apart than a tile of odd rows, are equal and next to row 0."""
    x = torch.cat([x[:1], x[:1] * 0.5, x[2:139], x[:1] * 0.5, x[140:]])
    return kernels.bipartite_match(x, [141, 0, 7])


def maxmin(x: Tensor, **options: Any) -> Tensor:
    """Half of the first rows are those before them, but for their lengths or rounding."""
    copies = x[:36] * (1 + 3e-7 if options.get("metric") == "rms" else 3)
    x = torch.cat([x[:36], copies, x[72:]])
    weights = 1 + torch.arange(len(x), device=x.device) % 3
    how = {"spans": [72, 1, 40], "weights": weights, "ordered": True, **options}
    return kernels.maxmin_select(x, [60, 1, 9], **how)


def given(x: Tensor, number: int, **options: Any) -> Tensor:
    """Margins, bonuses and several first choices in the first span."""
    start = torch.arange(70, device=x.device) * 25 % 71
    start[60:] = 0
    some = torch.tensor([number, 1, 1], device=x.device)
    how = {"start": start, "given": some, "margin": x[:3, 0].abs(), "bonus": x[:, 1].abs()}
    return maxmin(x, **{**how, **options})


def ties(x: Tensor) -> Tensor:
    """Eleven rows of each of five directions, so that the candidates of a round have one alone."""
    eye = torch.eye(6, device=x.device)
    rows, start = torch.cat([eye[:1], eye[1:].repeat_interleave(11, 0)]), x[:1, 0].int() * 0
    return kernels.maxmin_select(rows, 20, start=start, ordered=True)


def unit(x: Tensor) -> Tensor:
    """Unit rows; three of them are copies of others."""
    x = x / x.norm(dim=1, keepdim=True)
    return torch.cat([x[:3], x[:3], x[6:]])


def covered(x: Tensor) -> Tensor:
    """Coverings of other points by a softmax."""
    x, points, lengths, reach = unit(x), 3 * x[:33], [40, 0, 13], [26, 0, 7]
    logits = [p @ u.T for p, u in zip(points.split(reach), x.split(lengths), strict=True)]
    offset = torch.cat([part.logsumexp(1) for part in logits if len(part)])
    how = {"points": points, "point_spans": reach, "offset": offset}
    return kernels.facility_select(x, [9, 0, 6], spans=lengths, **how)


def facility(x: Tensor) -> Tensor:
    """The last span has five rows four times, but for rounding, and more choices."""
    x, w = unit(x), x[:, 0].abs()
    x, w = (torch.cat([t[:33], t[33:38].repeat(4, *[1] * (t.dim() - 1))]) for t in (x, w))
    x = x * (1 + 2e-7 * (torch.arange(53, device=x.device) * 7 % 4))[:, None]
    return kernels.facility_select(x, [12, 0, 9], w, spans=[33, 0, 20])


def dpp(x: Tensor) -> Tensor:
    """More rows than directions; copies have one relevance."""
    x = unit(x)
    return kernels.dpp_select(x, [12, 0, 3], 1.1 + x[:, 0], spans=[33, 0, 20])


CASES = {
    "attention_colsum": Case(
        (1, 2, 9, 24),
        lambda x: kernels.attention_colsum(x[:, :, :5], x, x[:, :, :5, 0], heads="rms"),
    ),
    "attention_colsum, padded": Case((2, 2, 265, 40), lambda x: colsum(x, 19)),
    "attention_colsum, many rows": Case(
        (2, 2, 90, 40), lambda x: colsum(x, 70, 10, heads="mean"), (("MANY_ROWS", 32),)
    ),
    "attention_colsum, iterated": Case((2, 1, 40, 20), lambda x: colsum(x, 40, iterations=2)),
    "bipartite_match": Case((148, 20), match),
    "ccam_attention": Case(
        (1, 2, 270, 24), lambda x: kernels.ccam_attention(x[:, :, :19], x, x.flip(2), 9)
    ),
    "ccam_attention, free": Case(
        (1, 2, 30, 24), lambda x: kernels.ccam_attention(x, x, x.flip(2), 3, causal=False)
    ),
    "dpp_select": Case((53, 9), dpp),
    "facility_select": Case((53, 9), facility),
    "facility_select, softmax": Case((53, 9), covered),
    "frame_pool": Case(
        (4, 7, 5, 300), lambda x: kernels.frame_pool(x, [(4, 3), (7, 5), (1, 1), (3, 5)])
    ),
    "gather_rows": Case((2, 12, 20), layer),
    "maxmin_select": Case((113, 40), maxmin),
    "maxmin_select, no weights": Case((113, 40), lambda x: maxmin(x, weights=None)),
    "maxmin_select, given": Case((113, 40), lambda x: given(x, 2)),
    "maxmin_select, isolated": Case((113, 40), lambda x: maxmin(x, start="isolated")),
    "maxmin_select, pairs": Case((40, 40), lambda x: kernels.maxmin_select(unit(x), 1, spans=2)),
    "maxmin_select, rms": Case((113, 9), lambda x: maxmin(x, metric="rms", margin=x[:3, 0].abs())),
    "maxmin_select, rounds": Case(
        (113, 40), lambda x: given(x, 40), (("MAX_GRAM_ROWS", 50), ("CANDIDATES", 8))
    ),
    "maxmin_select, rounds of rms": Case(
        (113, 9),
        lambda x: given(x, 40, metric="rms"),
        (("MAX_GRAM_ROWS", 50), ("CANDIDATES", 8)),
    ),
    "maxmin_select, rounds of ties": Case(
        (56, 6), ties, (("MAX_GRAM_ROWS", 50), ("CANDIDATES", 8))
    ),
    "mean_distance": Case((53, 70), lambda x: kernels.mean_distance(x + 0.3, spans=[33, 0, 20])),
    "merge_rows": Case((60, 80), lambda x: merged(x, frames=[42, 0, 18])),
    "merge_rows, sorted": Case((60, 80), lambda x: merged(x, weighted=False), (("MAX_SCAN", 9),)),
    "nearest_previous_frame": Case((3, 5, 4, 70), kernels.nearest_previous_frame),
    "topk_stable": Case(
        (1100, 1),
        lambda x: kernels.topk_stable((2 * x[:, 0]).round(), [3, 0, 200], spans=[40, 0, 1060]),
    ),
}


def op_of(name: str) -> str:
    """The op of a case, whose name is that of the op, and a few words after a comma."""
    return name.partition(",")[0]


def leaves(result: Any) -> list[Tensor]:
    """Tensors of a result, which may be a tensor, a list or a tuple."""
    return [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]
