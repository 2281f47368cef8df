"""Comparator: max-min diversity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.reducers._rows import finite_rows, joined, split
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.tokens import Reduction, VisualTokens

BLOCK = 1 << 24


@register_reducer("divprune")
@dataclass(frozen=True)
class DivPrune(Reducer):
    """Greedy max-min diversity (DivPrune, arXiv 2503.02175).

    The first token is the one whose nearest neighbour is farthest (cosine distance); then, again
    and again, the token farthest from all that were chosen. A span is one problem: a video spends
    its budget on the frames that differ, unless the model gets every frame as a span of its own
    (InternVL, SmolVLM); then every frame spends its own, and so does every tile of an image.
    """

    summary = "greedy max-min cosine distance (DivPrune 2503.02175)"
    serving_safe = True

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import maxmin_select

        rows, special = split(tokens)
        x = tokens.features[rows]
        finite_rows(x)
        start = most_isolated(x)[None]
        return joined(tokens, rows[maxmin_select(x, keep - special.numel(), start=start)])


def most_isolated(x: Tensor) -> Tensor:
    """Row of x (n, d) whose most similar other row is least similar; ties to the lower index."""
    unit = torch.nn.functional.normalize(x.float(), dim=1)
    n = unit.shape[0]
    nearest = []
    for begin in range(0, n, step := max(1, BLOCK // n)):
        cosine = unit[begin : begin + step] @ unit.T
        at = torch.arange(cosine.shape[0], device=x.device)
        cosine[at, at + begin] = -torch.inf
        nearest.append(cosine.amax(1))
    return torch.cat(nearest).argmin()
