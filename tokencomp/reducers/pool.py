"""Progressive pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokencomp.errors import OptionError
from tokencomp.reducers._options import check_range
from tokencomp.reducers._rows import finite_rows, rewritten, share, whole_grid
from tokencomp.reducers.base import Reducer, check_choice, register_reducer
from tokencomp.tokens import Reduction, VisualTokens

GROUPS = (2, 4, 8)
STRIDE = 2.0  # of the paper's figure
COARSEST = 4.0  # solved strides end here
MOST_STRIDE = 1024  # tokens; no frame has longer sides


@register_reducer("pool")
@dataclass(frozen=True)
class Pool(Reducer):
    """Pool frames: the first of every group finely, the others coarsely (arXiv 2409.20018).

    A single image is pooled to the nearest grid. Pooled tokens are area means (or bilinear) of the
    whole map.

    Attributes
    ----------
    group
        Frames per group; None: the one of 2, 4, 8 for which whole first frames and others at
        `stride` (where None: 2) come nearest to the budget.
    stride
        How much coarser the sides of the other frames are, at most; 2 in the paper's figure. None:
        as much as whole first frames need, up to 4. 1 pools all frames alike.
    mode
        "area" or "bilinear".
    position
        Position of a pooled token: "mean" (that of the member at its rounded mean place), "first"
        (its first member's), or None: "first" on models with one position per token, else "mean".

    Notes
    -----
    Ours, since the paper leaves the numbers open: first frames are whole as long as the stride
    allows; below that they get stride² times the tokens of the others. Firsts and others share
    their parts evenly, and a part that no grid has is met by rows of unequal length, so the count
    is always exact. No frame goes while there is a token for each; the last to go are first frames.

    The default is the paper's. On videos of the embedded models, down to a quarter of the tokens,
    plain pooling (stride=1) answers more and stride=None less: the other frames pay too much for
    whole first ones (benchmarks/accuracy/choice.md has all three, on validation).
    """

    group: int | None = None
    stride: float | None = STRIDE
    mode: str = "area"
    position: str | None = None

    summary = "progressive pooling of frames, 2-D pooling of images (2409.20018)"
    serving_safe = True
    merges = True
    whole_spans = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pool", "mode", self.mode, ("area", "bilinear"))
        check_choice("pool", "position", self.position, (None, "mean", "first"))
        if self.stride is not None:
            check_range("pool", "stride", self.stride, 1, MOST_STRIDE)
        if self.group is not None and self.group < 1:
            raise OptionError(f"pool: group={self.group!r}; allowed: None (solved), 1, 2, 3, ...")

    def for_model(self, model: nn.Module) -> Pool:
        from tokencomp.adapters.base import adapter_for

        return self.for_positions(adapter_for(model).mrope)

    def for_positions(self, mrope: bool) -> Pool:
        if self.position is None and not mrope:
            return replace(self, position="first")
        return self

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        t, h, w = tokens.grid
        rows = whole_grid(tokens, "pool")
        finite_rows(tokens.features[rows])
        quota = self.frame_quota(t, h * w, keep - int(tokens.special.sum()))
        live = [f for f in range(t) if quota[f]]
        lines = [line_widths(quota[f], h, w) for f in live]
        x = tokens.features[rows].view(t, h, w, -1)[live]
        pooled = pool_lines(x, lines, self.mode)
        place = places(lines, h, w, self.position or "mean").to(x.device)
        counts = torch.tensor([quota[f] for f in live], device=x.device)
        frame = torch.tensor(live, device=x.device).repeat_interleave(counts)
        sizes = (h * w / counts).repeat_interleave(counts)
        return rewritten(tokens, rows[frame * h * w + place], pooled, sizes)

    def frame_quota(self, frames: int, cells: int, budget: int) -> list[int]:
        """Tokens of every frame: whole numbers in 0 … cells that sum to `budget`."""
        group = self.group or solved_group(frames, cells, budget, self.stride or STRIDE)
        high = -(-frames // group)
        low = frames - high
        fine = min(budget / (high + low / (self.stride or COARSEST) ** 2), cells)
        least, most = min(high, budget), max(high, budget - low)  # one each, first frames before
        firsts = min(max(round(high * fine), least), most)
        fines, coarses = iter(share(firsts, [1] * high)), iter(share(budget - firsts, [1] * low))
        return [next(coarses if f % group else fines) for f in range(frames)]


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
    ideal = int((tokens * height / width) ** 0.5 + 0.5)
    least = -(-tokens // width)
    lines = max(least, min(height, tokens, ideal))
    even = (n for n in (lines, lines - 1, lines + 1) if least <= n <= height and tokens % n == 0)
    lines = next(even, lines)
    return share(tokens, [1] * lines)


def pool_lines(x: Tensor, lines: list[list[int]], mode: str) -> Tensor:
    """Pool frames x (T, H, W, d) to `lines[f]`: first the height, then every line's width."""
    from tokencomp.kernels import frame_pool

    _, _, width, dim = x.shape
    tall = frame_pool(x, [(len(widths), width) for widths in lines], mode)
    flat = [n for widths in lines for n in widths]
    return frame_pool(tall.view(len(flat), 1, width, dim), [(1, n) for n in flat], mode)


def places(lines: list[list[int]], height: int, width: int, position: str) -> Tensor:
    """Raster place in its frame of every token: of its "first" member, or of the "mean" one."""
    place = {"first": first, "mean": middle}[position]
    result = []
    for widths in lines:
        for i, n in enumerate(widths):
            row = place(i, len(widths), height)
            result += [row * width + place(j, n, width) for j in range(n)]
    return torch.tensor(result)


def first(i: int, parts: int, size: int) -> int:
    """First member of area-pooling cell i of `parts` along `size` places."""
    return i * size // parts


def middle(i: int, parts: int, size: int) -> int:
    """Rounded mean of the members of that cell."""
    return (first(i, parts, size) + -(-(i + 1) * size // parts)) // 2
