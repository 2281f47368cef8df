"""Progressive pooling."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.context import Reduction, VisualTokens
from tokencomp.errors import OptionError
from tokencomp.reducers.base import Reducer, check_choice, register_reducer
from tokencomp.reducers.options import check_range
from tokencomp.reducers.rows import finite, rewritten, whole_grid

GROUPS = (2, 4, 8)
MOST_STRIDE = 1024  # tokens; no frame has longer sides


@register_reducer("pool")
@dataclass(frozen=True)
class Pool(Reducer):
    """Pool frames: the first of every group finely, the others coarsely (arXiv 2409.20018).

    A single image is pooled to the nearest grid. Pooled tokens are area means (or bilinear) of the
    whole map; each keeps the position of the member at its rounded mean place.

    Attributes
    ----------
    group
        Frames per group, or 0: the one of 2, 4, 8 for which first frames at full resolution and
        others at `stride` come nearest to the budget.
    stride
        How much coarser the sides of the other frames are; the paper's figure shows 2.
    mode
        "area" or "bilinear".

    Notes
    -----
    Ours, since the paper leaves the numbers open: first frames get `stride`² times the tokens of
    the others, up to the full grid; what is left goes to the others. Budgets are made whole frame
    by frame along the video, and a budget that no grid has is met by rows of unequal length, so
    the count is always exact. Frames whose share is below one token go.
    """

    group: int = 0
    stride: float = 2.0
    mode: str = "area"

    summary = "progressive pooling of frames, 2-D pooling of images (2409.20018)"
    serving_safe = True
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pool", "mode", self.mode, ("area", "bilinear"))
        check_range("pool", "stride", self.stride, 1, MOST_STRIDE)
        if self.group < 0:
            raise OptionError(f"pool: group={self.group!r}; allowed: 0 (solved), 1, 2, 3, ...")

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        t, h, w = tokens.grid
        rows = whole_grid(tokens, "pool")
        finite(tokens.features[rows].norm(dim=1), "feature norms")
        quota = self.frame_quota(t, h * w, keep - int(tokens.special.sum()))
        live = [f for f in range(t) if quota[f]]
        lines = [line_widths(quota[f], h, w) for f in live]
        x = tokens.features[rows].view(t, h, w, -1)[live]
        pooled = pool_lines(x, lines, self.mode)
        place = places(lines, h, w, x.device)
        counts = torch.tensor([quota[f] for f in live], device=x.device)
        frame = torch.tensor(live, device=x.device).repeat_interleave(counts)
        sizes = (h * w / counts).repeat_interleave(counts)
        return rewritten(tokens, rows[frame * h * w + place], pooled, sizes)

    def frame_quota(self, frames: int, cells: int, budget: int) -> list[int]:
        """Tokens of every frame: whole numbers in 0 … cells that sum to `budget`."""
        group = self.group or solved_group(frames, cells, budget, self.stride)
        first = [f % group == 0 for f in range(frames)]
        high, low = sum(first), frames - sum(first)
        fine = min(budget / (high + low / self.stride**2), cells)
        coarse = (budget - high * fine) / low if low else 0.0
        if coarse > cells:
            fine = coarse = budget / frames
        sums = itertools.accumulate((fine if f else coarse for f in first), initial=0.0)
        ends = [int(s + 0.5 + 1e-6) for s in sums]
        ends[-1] = budget
        return [b - a for a, b in itertools.pairwise(ends)]


def solved_group(frames: int, cells: int, budget: int, stride: float) -> int:
    """The group size whose natural budget is nearest to the wanted one; ties to the smaller."""

    def natural(group: int) -> float:
        high = -(-frames // group)
        return cells * (high + (frames - high) / stride**2)

    return min(GROUPS, key=lambda g: (abs(natural(g) - budget), g))


def line_widths(tokens: int, height: int, width: int) -> list[int]:
    """Tokens per line of a pooled frame: as square as the frame, exact in sum.

    Lines differ by at most one token; there are at most `height` of at most `width` tokens.
    """
    ideal = (tokens * height / width) ** 0.5
    least = -(-tokens // width)
    lines = max(1, least, min(height, tokens, int(ideal + 0.5)))
    near = [n for n in (lines, lines - 1, lines + 1) if least <= n <= height and tokens % n == 0]
    lines = near[0] if least <= lines and near and near[0] >= 1 else lines
    bounds = [tokens * i // lines for i in range(lines + 1)]
    return [b - a for a, b in itertools.pairwise(bounds)]


def pool_lines(x: Tensor, lines: list[list[int]], mode: str) -> Tensor:
    """Pool frames x (T, H, W, d) to `lines[f]`: first the height, then every line's width."""
    from tokencomp.kernels import frame_pool

    _, _, width, dim = x.shape
    tall = frame_pool(x, [(len(widths), width) for widths in lines], mode)
    flat = [n for widths in lines for n in widths]
    return frame_pool(tall.view(len(flat), 1, width, dim), [(1, n) for n in flat], mode)


def places(lines: list[list[int]], height: int, width: int, device: torch.device) -> Tensor:
    """Raster place (in its frame) of the member at the rounded mean place of every token."""
    result = []
    for widths in lines:
        for i, n in enumerate(widths):
            row = middle(i, len(widths), height)
            result += [row * width + middle(j, n, width) for j in range(n)]
    return torch.tensor(result, device=device)


def middle(i: int, parts: int, size: int) -> int:
    """Rounded mean of the members of area-pooling cell i of `parts` along `size` places."""
    return (i * size // parts + -(-(i + 1) * size // parts) - 1 + 1) // 2
