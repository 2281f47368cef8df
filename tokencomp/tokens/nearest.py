"""Which of some chosen patches of its span every patch resembles most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.tokens.patches import Patches, by_group

BLOCK = 1 << 24  # cosines computed at once
LOST = -1  # of patches of a span that has none chosen


def nearest(patches: Patches, x: Tensor, chosen: Tensor, counts: Sequence[int]) -> Tensor:
    """The chosen patch of the same span whose x has the largest cosine, int64, (patches,).

    Spans of as many patches, and as many chosen ones, are compared together.

    Parameters
    ----------
    x : Tensor, shape (patches, d)
        What is compared.
    chosen : Tensor of int64, shape (k,)
        Patches, ascending.
    counts
        How many of them every span has.
    """
    starts, firsts = patches.starts, list(itertools.accumulate(counts, initial=0))

    def of_group(members: list[int], rows: Tensor) -> Tensor:
        count = counts[members[0]]
        if not count:
            return torch.full((len(rows),), LOST, device=rows.device)
        own = chosen
        if len(members) < len(patches.lengths):
            places = [np.arange(firsts[m], firsts[m] + count) for m in members]
            own = chosen.index_select(0, patches.table(np.concatenate(places)))
        own = own.view(len(members), count)
        in_span = own - patches.table([starts[m] for m in members])[:, None]
        features = rows.float().view(len(members), -1, rows.shape[1])
        return _nearest(features, own, in_span).flatten()

    return by_group(patches, list(zip(patches.lengths, counts, strict=True)), of_group, x)


def _nearest(x: Tensor, chosen: Tensor, in_span: Tensor) -> Tensor:
    """Numbers of the nearest chosen patches, (spans, n).

    Parameters
    ----------
    x : Tensor of float32, shape (spans, n, d)
    chosen, in_span : Tensor of int64, shape (spans, k)
        Numbers of the chosen patches in the batch, and in their span.
    """
    unit = normalize(x, dim=2)
    others = unit.gather(1, in_span[:, :, None].expand(-1, -1, x.shape[2])).mT
    step = max(1, BLOCK // chosen.numel())
    blocks = [(unit[:, at : at + step] @ others).argmax(2) for at in range(0, x.shape[1], step)]
    return chosen.gather(1, torch.cat(blocks, 1))
