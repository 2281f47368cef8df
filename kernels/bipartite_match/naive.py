"""Plain PyTorch version of :func:`tokencomp.kernels.bipartite_match`."""

import torch
from tokencomp.kernels.checks import groups, stacked
from torch import Tensor

# Number of similarities that are in memory at once (16 MiB in fp32).
BLOCK_ELEMENTS = 1 << 22


def bipartite_match(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Match frames of equal length as a batch, with one block of similarities in memory at a time.

    `x` is ``(n, D)``; the two results are ``(n,)`` as in
    :func:`tokencomp.kernels.bipartite_match`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    similarity = torch.full((len(x),), -torch.inf, dtype=dtype, device=x.device)
    partner = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    for length, starts in groups(lengths).items():
        if length < 2:
            continue
        evens, odds = (length + 1) // 2, length // 2
        frames = max(1, BLOCK_ELEMENTS // (evens * odds))
        rows = max(1, BLOCK_ELEMENTS // odds)
        for first in range(0, len(starts), frames):
            chosen = starts[first : first + frames]
            unit = normalise(stacked(x, chosen, length).to(dtype))
            start = torch.tensor(chosen, device=x.device)[:, None]
            for row in range(0, evens, rows):
                block = unit[:, 2 * row : 2 * (row + rows) : 2] @ unit[:, 1::2].transpose(1, 2)
                index = block.argmax(2)  # the first of equals, unlike `max`; NaN counts as most
                place = start + 2 * torch.arange(row, row + block.shape[1], device=x.device)
                similarity[place] = block.gather(2, index[..., None]).squeeze(2)
                partner[place] = start + 2 * index + 1
    return similarity, partner


def normalise(x: Tensor) -> Tensor:
    """Scale rows to length 1; zero rows stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
