"""Progressive pooling of video frames (arXiv 2409.20018)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, finite_features, register_reducer
from tokencomp.tokens.stacks import HostIndex, grouped
from tokencomp.tokens.tokens import ModelFacts
from tokencomp.validation import between

GROUPS = (2, 4, 8)


@register_reducer("pool")
@dataclass(frozen=True)
class Pool(Reducer):
    """Pool the first frame of every group finely, the others coarsely (arXiv 2409.20018).

    Pooled tokens are means over equal areas of the whole frame; an image is pooled as one frame.
    For T frames of n tokens in groups of g, of which H = ⌈T/g⌉ frames are first and L = T - H are
    not:

        g ∈ {2, 4, 8} such that n · (H + L / stride²) is nearest to the budget K
        tokens of a first frame:  min(K / (H + L / stride²), n);  others share the rest evenly

    Deviations from the paper, which leaves these numbers open (all ours):

    - A count that no grid has is met by rows of unequal length, so that it is always exact.
    - Every frame keeps a token while there are enough for all, first frames before the others.

    The default is the paper's. On videos of the embedded models, down to a quarter of the tokens,
    plain pooling (stride=1) answers more questions correctly, because whole first frames cost the
    other frames too much (benchmarks/accuracy/choice.md, validation questions).

    Attributes
    ----------
    stride
        At most how much coarser the sides of the other frames are; 2 in the paper's figure. 1 pools
        all frames equally.
    position
        Position of a pooled token: its "first" or its "mean" member's (at the rounded mean
        row and column). None: "first" on models with one position per token, else "mean".
    """

    stride: float = field(default=2.0, metadata=between(1, 1024))
    position: Literal["mean", "first"] | None = None

    summary = "progressive pooling of frames, 2-D pooling of images (2409.20018)"
    traits = Traits(merges=True, grid="whole", batched=True)

    def bind(self, facts: ModelFacts) -> Pool:
        if self.position is None and not facts.mrope:
            return replace(self, position="first")
        return self

    def reduce(self, tokens: Tokens) -> Kept:
        x, grids = finite_features(tokens.features), tokens.grids
        pooled, chosen, sizes = [], [], []
        # Spans whose frames have one size are pooled together.
        for (h, w), members in grouped([(h, w) for _, h, w in grids]).items():
            frames, lines = [], []
            # Tokens of every frame, and of every line in it.
            for m in members:
                quota = self.frame_quota(grids[m][0], h * w, tokens.budgets[m])
                frames += [tokens.starts[m] + f * h * w for f, n in enumerate(quota) if n]
                lines += [line_widths(n, h, w) for n in quota if n]
            # Pool all frames, and note a position and a weight for every pooled token.
            counts = [sum(widths) for widths in lines]
            rows = tokens.table(np.add.outer(frames, np.arange(h * w)).ravel())
            stack = x.index_select(0, rows).view(len(frames), h, w, -1)
            pooled.append(pool_lines(stack, lines))
            cells = positions(lines, h, w, self.position or "mean")
            chosen.append(cells + np.repeat(frames, counts))
            sizes.append(np.repeat(h * w / np.asarray(counts), counts))
        size = torch.from_numpy(np.concatenate(sizes).astype(np.float32)).to(tokens.device)
        rows = tokens.table(np.concatenate(chosen))
        return Kept.ascending(rows, torch.cat(pooled), size)

    def frame_quota(self, frames: int, cells: int, budget: int) -> list[int]:
        """Tokens of every frame: integers from 0 to `cells` whose sum is `budget`."""
        group = solved_group(frames, cells, budget, self.stride)
        high = -(-frames // group)
        low = frames - high
        fine = min(budget / (high + low / self.stride**2), cells)
        # Every frame keeps a token if there are enough, first frames before the others.
        least, most = min(high, budget), max(high, budget - low)
        firsts = min(max(round(high * fine), least), most)
        fines = iter(split_evenly(firsts, [1] * high))
        coarses = iter(split_evenly(budget - firsts, [1] * low))
        return [next(coarses if f % group else fines) for f in range(frames)]


def solved_group(frames: int, cells: int, budget: int, stride: float) -> int:
    """The group size whose token count is nearest to `budget`; ties: the smaller size."""

    def natural(group: int) -> float:
        high = -(-frames // group)
        return cells * (high + (frames - high) / stride**2)

    return min(GROUPS, key=lambda g: (abs(natural(g) - budget), g))


def line_widths(tokens: int, height: int, width: int) -> list[int]:
    """Tokens in every line of a pooled frame, with the frame's aspect ratio and an exact sum.

    Lines differ by at most one token; there are at most `height` of at most `width` tokens.
    """
    # The number of lines nearest to the aspect ratio, or next to it if that divides `tokens`.
    ideal = int((tokens * height / width) ** 0.5 + 0.5)
    least = -(-tokens // width)
    lines = max(least, min(height, tokens, ideal))
    even = (n for n in (lines, lines - 1, lines + 1) if least <= n <= height and tokens % n == 0)
    lines = next(even, lines)
    return split_evenly(tokens, [1] * lines)


def pool_lines(x: Tensor, lines: list[list[int]]) -> Tensor:
    """Pool frames x (T, H, W, d) to `lines[f]`: first the height, then the width of every line."""
    from tokencomp.kernels import frame_pool

    _, _, width, dim = x.shape
    tall = frame_pool(x, [(len(widths), width) for widths in lines])
    flat = [n for widths in lines for n in widths]
    pooled: Tensor = frame_pool(tall.view(len(flat), 1, width, dim), [(1, n) for n in flat])
    return pooled


def positions(lines: list[list[int]], height: int, width: int, position: str) -> HostIndex:
    """Raster index in its frame of the "first" or "mean" member of every pooled token."""
    result = []
    for widths in lines:
        rows = members(len(widths), height, position) * width
        result += [row + members(n, width, position) for row, n in zip(rows, widths, strict=True)]
    return np.concatenate(result)


def members(parts: int, size: int, position: str) -> HostIndex:
    """The "first" or rounded "mean" member of every cell if `size` are pooled to `parts` cells."""
    ends = np.arange(parts + 1) * size
    first = ends[:-1] // parts
    return first if position == "first" else (first + -(-ends[1:] // parts)) // 2
