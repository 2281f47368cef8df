"""Similarity merging (AIM stage A)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.context import Reduction, VisualTokens
from tokencomp.reducers.base import Reducer, check_choice, register_reducer
from tokencomp.reducers.rows import finite, rewritten, sizes_before, split


@register_reducer("merge")
@dataclass(frozen=True)
class Merge(Reducer):
    """Merge the most similar tokens of every frame until the budget is met.

    One step, per frame: tokens at even places look for their most similar token at an odd place
    (cosine); the r ≤ N // 2 best pairs merge. Steps repeat with r as large as possible, as in
    AIM's 196 → 98 → 49 (arXiv 2412.03248; the idea is ToMe's, arXiv 2210.09461).

    Attributes
    ----------
    weighted
        True (ours): means weighted by how many tokens a row stands for. False: AIM's plain mean
        of means.
    temporal
        True: pairs may lie in different frames of a video (ours).
    position
        Position of a merged token: "keep" (the odd-placed one's) or "first" (its first member's).

    Notes
    -----
    Output stays in raster order (ours; the authors' code reorders where r < N/2). A video with
    fewer kept tokens than frames merges groups of neighbouring frames (ours).
    """

    weighted: bool = True
    temporal: bool = False
    position: str = "keep"

    summary = "similarity merging inside each frame (AIM 2412.03248, ToMe 2210.09461)"
    serving_safe = True
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merge", "position", self.position, ("keep", "first"))

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        patches, special = split(tokens)
        finite(tokens.features[patches].norm(dim=1), "feature norms")
        budget = keep - special.numel()
        groups = self._groups(tokens, patches, budget)
        quota = split_evenly(budget, len(groups))
        before = sizes_before(tokens)
        x, sizes, rows = self._merge(
            tokens.features[patches], patches, before[patches], groups, quota
        )
        return rewritten(tokens, rows, x, sizes)

    def _groups(self, tokens: VisualTokens, patches: Tensor, budget: int) -> list[int]:
        """Lengths of the runs of patches inside which tokens may merge."""
        t = tokens.grid[0]
        if self.temporal or t == 1:
            return [patches.numel()]
        if tokens.index is None:
            per = [tokens.grid[1] * tokens.grid[2]] * t
        else:
            total = t * tokens.grid[1] * tokens.grid[2]
            frame = (tokens.offsets[patches] * t // total).clamp(max=t - 1)
            per = [n for n in torch.bincount(frame, minlength=t).tolist() if n]
        bounds = split_evenly(len(per), min(len(per), budget))
        lengths, at = [], 0
        for n in bounds:
            lengths.append(sum(per[at : at + n]))
            at += n
        return lengths

    def _merge(
        self, x: Tensor, rows: Tensor, sizes: Tensor, lengths: list[int], quota: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merge every group down to its quota: features, sizes, positions (raster rows)."""
        from tokencomp.kernels import bipartite_match, merge_rows

        quota = [min(q, n) for q, n in zip(quota, lengths, strict=True)]
        while lengths != quota:
            steps = [min(n - q, n // 2) for n, q in zip(lengths, quota, strict=True)]
            similarity, partner = bipartite_match(x, lengths)
            gone = best_per_group(similarity, lengths, steps)
            target = torch.where(gone, partner, torch.arange(x.shape[0], device=x.device))
            x, sizes, moved = merge_rows(
                x,
                target,
                (~gone).nonzero()[:, 0],
                sizes,
                frames=lengths,
                positions=rows,
                weighted=self.weighted,
                position=self.position,
            )
            rows = moved if moved.ndim == 1 else moved[0]
            lengths = [n - r for n, r in zip(lengths, steps, strict=True)]
        order = rows.argsort()
        return x[order], sizes[order], rows[order]


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most one, spread evenly."""
    bounds = [total * i // parts for i in range(parts + 1)]
    return [b - a for a, b in itertools.pairwise(bounds)]


def best_per_group(similarity: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
    """Mask of the `counts[g]` largest values of every group g; ties go to the lower index.

    Parameters
    ----------
    similarity : Tensor, shape (n,)
        Groups one after the other.
    """
    device = similarity.device
    width, groups = max(lengths), len(lengths)
    sizes = torch.tensor(lengths, device=device)
    group = torch.repeat_interleave(torch.arange(groups, device=device), sizes)
    place = torch.arange(similarity.numel(), device=device) - (sizes.cumsum(0) - sizes)[group]
    table = similarity.new_full((groups, width), -torch.inf)
    table[group, place] = similarity
    ranked = table.sort(dim=1, descending=True, stable=True).indices
    wanted = torch.arange(width, device=device)[None] < torch.tensor(counts, device=device)[:, None]
    chosen = torch.zeros(groups, width, dtype=torch.bool, device=device)
    chosen.scatter_(1, ranked, wanted)
    return chosen[group, place]
