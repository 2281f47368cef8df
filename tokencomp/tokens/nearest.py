"""Which of some chosen patches of its span every patch resembles most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.tokens.patches import Patches
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, starts_of

BLOCK = 1 << 24  # cosines computed at once
LOST = -1  # of patches of a span that has none chosen


def nearest(patches: Patches, x: Tensor, chosen: Tensor, counts: Sequence[int]) -> Tensor:
    """The chosen patch of the same span whose x has the largest cosine, int64, (patches,).

    Parameters
    ----------
    x : Tensor, shape (patches, d)
        What is compared.
    chosen : Tensor of int64, shape (k,)
        Patches, ascending.
    counts
        How many of them every span has.
    """
    every = np.asarray(counts)
    if not every.all():  # a span without any has LOST in place of one
        rows = np.insert(np.arange(len(chosen)), starts_of(every)[:-1][every == 0], len(chosen))
        chosen = torch.cat([chosen, chosen.new_tensor([LOST])])[patches.table(rows)]
        every = np.maximum(every, 1)
    firsts, unit = starts_of(every), normalize(x.float(), dim=1)

    def of_stack(spans: HostIndex, _: Stack, rows: Tensor) -> Tensor:
        picked = Stack(firsts[spans], every[spans], x.device)
        own = picked.of(chosen)
        others, step = unit[own].mT, max(1, BLOCK // own.numel())
        parts = (masked(part @ others, picked.lengths, -torch.inf) for part in rows.split(step, 1))
        return own.gather(1, torch.cat([part.argmax(2) for part in parts], 1))

    return by_stack(patches.lengths, of_stack, unit)
