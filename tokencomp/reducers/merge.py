"""Similarity merging (AIM stage A)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokencomp.plan import split_evenly
from tokencomp.reducers._rows import (
    finite_features,
    patch_rows,
    patches_per_frame,
    replace_patches,
    token_sizes,
    tower_keys,
)
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import TOWER_KEYS, Reduction, Signal, VisualTokens


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
    metric
        What is compared: "features", the projected tokens (AIM for video), or "vit_keys", keys of
        the vision tower's last block but one (AIM for images, where the tower is CLIP's). Keys are
        merged together with the features.

    Notes
    -----
    Output stays in raster order (ours; the authors' code reorders where r < N/2). A video with
    fewer kept tokens than frames merges groups of neighbouring frames (ours). Where an earlier
    stage has left frames of different length, every frame that has tokens keeps one, and the rest
    of the budget is split in proportion to what is left of each (ours).
    """

    weighted: bool = True
    temporal: bool = False
    position: Literal["keep", "first"] = "keep"
    metric: Literal["features", "vit_keys"] = "features"

    summary = "similarity merging inside each frame (AIM 2412.03248, ToMe 2210.09461)"
    merges = True

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({TOWER_KEYS} if self.metric == "vit_keys" else ())

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        patches, budget = patch_rows(tokens, keep)
        x = finite_features(tokens.features[patches])
        width, compared = x.shape[1], slice(None)
        if self.metric == "vit_keys":
            x = torch.cat([x, tower_keys(tokens, "merge")[patches].to(x)], dim=1)
            compared = slice(width, None)
        groups = self._groups(tokens, patches.numel(), budget)
        quota = [1 + q for q in split_evenly(budget - len(groups), [n - 1 for n in groups])]
        before = token_sizes(tokens)[patches]
        x, sizes, rows = self._merge(x, compared, patches, before, groups, quota)
        return replace_patches(tokens, rows, x[:, :width], sizes)

    def _groups(self, tokens: VisualTokens, patches: int, budget: int) -> list[int]:
        """Lengths of the runs of patches inside which tokens may merge, at most `budget` runs."""
        if self.temporal or tokens.grid[0] == 1:
            return [patches]
        frames = [n for n in patches_per_frame(tokens) if n]
        runs = split_evenly(len(frames), [1] * min(len(frames), budget))
        bounds = itertools.accumulate(runs, initial=0)
        return [sum(frames[a:b]) for a, b in itertools.pairwise(bounds)]

    def _merge(
        self,
        x: Tensor,
        compared: slice,
        rows: Tensor,
        sizes: Tensor,
        lengths: list[int],
        quota: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merge every group down to its quota; returns x, sizes and rows in raster order.

        Similarity is that of the columns `compared`; all columns of x are merged.
        """
        from tokencomp.kernels import bipartite_match, merge_rows

        while any(steps := [min(n - q, n // 2) for n, q in zip(lengths, quota, strict=True)]):
            similarity, partner = bipartite_match(x[:, compared].contiguous(), lengths)
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
    places = torch.arange(width, device=device)[None]
    within = places < torch.tensor(counts, device=device)[:, None]
    chosen = torch.zeros(groups, width, dtype=torch.bool, device=device)
    chosen.scatter_(1, ranked, within)
    return chosen[group, place]
