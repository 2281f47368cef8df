"""Progressive pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.counts import split_evenly
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.spans import ModelFacts
from tokencomp.tokens.stacks import HostIndex, grouped
from tokencomp.tokens.tokens import Tokens
from tokencomp.validation import check_range

GROUPS = (2, 4, 8)
STRIDE = 2.0  # of the paper's figure
MOST_STRIDE = 1024  # tokens; no frame has longer sides


@register_reducer("pool")
@dataclass(frozen=True)
class Pool(Reducer):
    """Pool frames: the first of every group finely, the others coarsely (arXiv 2409.20018).

    A single image is pooled to the nearest grid. Pooled tokens are area means of the whole map.

    Attributes
    ----------
    stride
        How much coarser the sides of the other frames are, at most; 2 in the paper's figure. 1
        pools all frames equally.
    position
        Position of a pooled token: "mean" (that of the member at its rounded mean place), "first"
        (its first member's), or None: "first" on models with one position per token, else "mean".

    Notes
    -----
    The paper leaves the numbers open; these rules are ours. A group has 2, 4 or 8 frames, as many
    as bring whole first frames and others at `stride` nearest to the budget. First frames stay
    whole as long as the stride allows it; below that they get stride² times the tokens of the
    others. The tokens of each group are split evenly over its frames. A count that no grid has is
    met by rows of unequal length, so that it is always exact. Every frame keeps a token while
    there are enough for all; first frames are the last to lose theirs.

    The default is the paper's. On videos of the embedded models, down to a quarter of the tokens,
    plain pooling (stride=1) answers more questions correctly, because whole first frames cost the
    other frames too much (benchmarks/accuracy/choice.md, validation questions).
    """

    stride: float = STRIDE
    position: Literal["mean", "first"] | None = None

    summary = "progressive pooling of frames, 2-D pooling of images (2409.20018)"
    traits = Traits(merges=True, grid="whole", batched=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("pool", "stride", self.stride, 1, MOST_STRIDE)

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
            for m in members:
                quota = self.frame_quota(grids[m][0], h * w, tokens.budgets[m])
                frames += [tokens.starts[m] + f * h * w for f, n in enumerate(quota) if n]
                lines += [line_widths(n, h, w) for n in quota if n]
            counts = [sum(widths) for widths in lines]
            rows = tokens.table(np.add.outer(frames, np.arange(h * w)).ravel())
            stack = x.index_select(0, rows).view(len(frames), h, w, -1)
            pooled.append(pool_lines(stack, lines))
            place = places(lines, h, w, self.position or "mean")
            chosen.append(place + np.repeat(frames, counts))
            sizes.append(np.repeat(h * w / np.asarray(counts), counts))
        size = torch.from_numpy(np.concatenate(sizes).astype(np.float32)).to(tokens.device)
        rows = tokens.table(np.concatenate(chosen))
        return Kept.ascending(rows, torch.cat(pooled), size)

    def frame_quota(self, frames: int, cells: int, budget: int) -> list[int]:
        """Tokens of every frame: whole numbers in 0 … cells that sum to `budget`."""
        group = solved_group(frames, cells, budget, self.stride)
        high = -(-frames // group)
        low = frames - high
        fine = min(budget / (high + low / self.stride**2), cells)
        least, most = min(high, budget), max(high, budget - low)  # one each, first frames before
        firsts = min(max(round(high * fine), least), most)
        fines = iter(split_evenly(firsts, [1] * high))
        coarses = iter(split_evenly(budget - firsts, [1] * low))
        return [next(coarses if f % group else fines) for f in range(frames)]


def solved_group(frames: int, cells: int, budget: int, stride: float) -> int:
    """The group size whose natural budget is nearest to `budget`; ties to the smaller."""

    def natural(group: int) -> float:
        high = -(-frames // group)
        return cells * (high + (frames - high) / stride**2)

    return min(GROUPS, key=lambda g: (abs(natural(g) - budget), g))


def line_widths(tokens: int, height: int, width: int) -> list[int]:
    """Tokens per line of a pooled frame: as square as the frame, exact in sum.

    Lines differ by at most one token; there are at most `height` of at most `width` tokens.
    """
    ideal = int((tokens * height / width) ** 0.5 + 0.5)
    least = -(-tokens // width)
    lines = max(least, min(height, tokens, ideal))
    even = (n for n in (lines, lines - 1, lines + 1) if least <= n <= height and tokens % n == 0)
    lines = next(even, lines)
    return split_evenly(tokens, [1] * lines)


def pool_lines(x: Tensor, lines: list[list[int]]) -> Tensor:
    """Pool frames x (T, H, W, d) to `lines[f]`: first the height, then every line's width."""
    from tokencomp.kernels import frame_pool

    _, _, width, dim = x.shape
    tall = frame_pool(x, [(len(widths), width) for widths in lines])
    flat = [n for widths in lines for n in widths]
    pooled: Tensor = frame_pool(tall.view(len(flat), 1, width, dim), [(1, n) for n in flat])
    return pooled


def places(lines: list[list[int]], height: int, width: int, position: str) -> HostIndex:
    """Raster place in its frame of every token: of its "first" member, or of the "mean" one."""
    place = {"first": first, "mean": middle}[position]
    result = []
    for widths in lines:
        for i, n in enumerate(widths):
            row = place(i, len(widths), height)
            result += [row * width + place(j, n, width) for j in range(n)]
    return np.asarray(result, dtype=np.int64)


def first(i: int, parts: int, size: int) -> int:
    """First member of area-pooling cell i of `parts` along `size` places."""
    return i * size // parts


def middle(i: int, parts: int, size: int) -> int:
    """Rounded mean of the members of that cell."""
    return (first(i, parts, size) + -(-(i + 1) * size // parts)) // 2
