"""Comparator: max-min diversity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.reducers._rows import finite_features, keep_patches, patch_rows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import Reduction, VisualTokens

BLOCK = 1 << 24


@register_reducer("divprune")
@dataclass(frozen=True)
class DivPrune(Reducer):
    """Greedy max-min diversity (DivPrune, arXiv 2503.02175).

    The first token is the one whose nearest neighbour is farthest (cosine distance). Every next
    token is the one farthest from all chosen so far. Tokens are chosen per span: a video spends
    its budget on the frames that differ. Models that get every frame of a video, or every tile of
    an image, as a span of its own (InternVL, SmolVLM) keep the same share of each.
    """

    summary = "greedy max-min cosine distance (DivPrune 2503.02175)"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import maxmin_select

        rows, budget = patch_rows(tokens, keep)
        x = finite_features(tokens.features[rows])
        start = most_isolated(x)[None]
        return keep_patches(tokens, rows[maxmin_select(x, budget, start=start)])


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
