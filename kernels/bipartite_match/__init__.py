"""The most similar odd row of every even row of a frame, by cosine similarity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch

# Number of similarities that are in memory at once (16 MiB in fp32).
BLOCK_ELEMENTS = 1 << 22


def bipartite_match(
    x: Tensor, frames: int | Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Match every even row of a frame with its most similar odd row.

    .. math:: partner_a = \arg\max_{b \; odd} \frac{x_a \cdot x_b}{|x_a| |x_b|}

    Parameters
    ----------
    x
        Features ``(n, D)``, frames one after the other. Even and odd count within the frame.
    frames
        Tokens per frame, as an int for equal frames or as one length per frame. None means that
        all rows are one frame.

    Returns
    -------
    similarity : Tensor
        Cosine with the best partner, fp32 ``(n,)`` (fp64 for fp64 features); -inf at odd rows and
        in frames that have no odd row.
    partner : Tensor
        Row of the best partner in `x`, int64 ``(n,)``, the lowest of equally good ones; -1 where
        `similarity` is -inf.

    Raises
    ------
    KernelError
        If the frames do not cover `x`, or features are NaN or infinite.

    Notes
    -----
    The cost is ``n·N·D/2`` FLOPs for frames of N tokens and ``n·D·itemsize + 12·n`` bytes:
    normalisation and maximum are fused, and no similarity matrix is stored. A zero row has cosine 0
    with every row. The method is the bipartite soft matching of ToMe (arXiv 2210.09461).
    """
    checks.operand("x", x, "(n, D)")
    return _op(x, checks.lengths_of("frames", frames, len(x)))


# A frame of 5 rows: cosines of even rows (left) with odd rows.
#             1    3
#     0      .2   .9     partner 3
#     2      .7   .7     partner 1, the lower of equals
#     4      .1   .4     partner 3
# Rows 1 and 3 have no partner: -inf and -1.
def naive(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Match frames of equal length as a batch, with one block of similarities in memory at a time.

    `x` is ``(n, D)``; the two results are ``(n,)`` as in
    :func:`tokencomp.kernels.bipartite_match`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    similarity = torch.full((len(x),), -torch.inf, dtype=dtype, device=x.device)
    partner = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    spans = [*zip(checks.starts(lengths), lengths, strict=True)]
    for length in dict.fromkeys(lengths):
        # Without an odd row the entries stay -inf and -1.
        if length < 2:
            continue
        starts = [start for start, rows in spans if rows == length]
        evens, odds = (length + 1) // 2, length // 2
        # Short frames are batched; one frame that is too long is cut into blocks of even rows.
        frames = max(1, BLOCK_ELEMENTS // (evens * odds))
        rows = max(1, BLOCK_ELEMENTS // odds)
        for first in range(0, len(starts), frames):
            chosen = starts[first : first + frames]
            unit = normalise(_stacked(x, chosen, length).to(dtype))
            start = torch.tensor(chosen, device=x.device)[:, None]
            for row in range(0, evens, rows):
                # (frames, even rows of the block, odd rows)
                block = unit[:, 2 * row : 2 * (row + rows) : 2] @ unit[:, 1::2].transpose(1, 2)
                index = block.argmax(2)  # the first of equals, unlike `max`; NaN counts as most
                place = start + 2 * torch.arange(row, row + block.shape[1], device=x.device)
                similarity[place] = block.gather(2, index[..., None]).squeeze(2)
                partner[place] = start + 2 * index + 1
    return similarity, partner


def _stacked(x: Tensor, first: list[int], length: int) -> Tensor:
    """Stack the equally long frames that start at `first` as ``(frames, length, D)``.

    The result is a view if the frames lie one after the other in `x` ``(n, D)``, and a copy
    otherwise.
    """
    if first == list(range(first[0], first[0] + len(first) * length, length)):
        return x[first[0] : first[0] + len(first) * length].unflatten(0, (len(first), length))
    return torch.stack([x[start : start + length] for start in first])


def normalise(x: Tensor) -> Tensor:
    """Scale rows to length 1; zero rows stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


_op = dispatch.Op(
    "bipartite_match",
    naive,
    lambda x, _: (
        x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty(len(x), dtype=torch.int64),
    ),
    check_result=lambda result: checks.cosines(result[0]),
)
