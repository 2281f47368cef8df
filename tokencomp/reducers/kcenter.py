"""Greedy k-center by appearance (Gonzalez 1985): the default in the vision tower (ours)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers._pixels import OF_FEATURES, OF_PIXELS
from tokencomp.validation import between

TURN = math.pi * (3 - math.sqrt(5))
"""The golden angle, in radians: its multiples never meet again, see `descriptor`."""


@register_reducer("kcenter")
@dataclass(frozen=True)
class KCenter(Reducer):
    """Greedy k-center by the root mean square of differences (Gonzalez 1985; use here ours).

        next = argmax_i  min over kept j of ‖x_i - x_j‖ / √d

    The first token is the one farthest from the mean. Uniform areas, such as a background, need few
    tokens. The distance keeps brightness, which a cosine of pixels would lose. Exact copies of a
    kept token come last: while the budget exceeds the number of different cells, a document or
    screen loses only copies (the regime of PixelPrune, arXiv 2604.00886), with `pool=1` to the
    pixel.

    Before the first block of the vision tower, x are averages of pixels, their standard deviations,
    and the temporal change within a cell (see `descriptor`). By averages alone, a word looks like
    the surface around it, and one phase of a blinking light represents all. On photographs, sharp
    areas get a larger share of the budget than smooth ones; under a moving camera all cells change,
    so similar cells of several steps are kept more often.

    Features in the decoder have no pixels to say what changes. With `step_weight` they get the
    change from step to step (see `with_steps`); without it, one of several equal events of a video
    represents all.

    Attributes
    ----------
    pool : int
        Side of the squares over which pixels are averaged inside each patch: 4 takes a sixteenth of
        the work and is robust to shifts by a pixel and to codec noise; 1 compares all pixels.
    std_weight : float
        Weight of the standard deviation of the pixels in a square, relative to their average; 0:
        not used. With 1 and normally distributed pixels the distance is Wasserstein-2.
    temporal_weight : float
        In towers that read several frames into one cell (the Qwen families): weight of the change
        between these frames; 0: not used.
    step_weight : float
        In the decoder: weight of the change of features from one step of a video to the next; 0:
        not used. Events that repeat are counted better by some models and worse by others
        (benchmarks/long/choice.md).
    """

    pool: int = field(default=4, metadata=OF_PIXELS | between(1, 64))
    std_weight: float = field(default=1.0, metadata=OF_PIXELS | between(0, 16))
    temporal_weight: float = field(default=1.0, metadata=OF_PIXELS | between(0, 16))
    step_weight: float = field(default=0.0, metadata=OF_FEATURES | between(0, 16))

    traits = Traits(batched=True)
    summary = "greedy k-center by appearance (Gonzalez 1985), default in the vision tower"

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x = descriptor(tokens, self.pool, self.std_weight, self.temporal_weight)
        if self.step_weight and tokens.pixels is None:
            x = with_steps(x, tokens, self.step_weight)
        how = {"spans": tokens.lengths, "metric": "rms", "trusted": True}
        return Kept(maxmin_select(x, tokens.budgets, **how))


def descriptor(
    tokens: Tokens, pool: int, std_weight: float = 0.0, temporal_weight: float = 0.0
) -> Tensor:
    """What patches look like, float32, shape (n, d).

    In the vision tower before its first block these are the pixels of a cell, averaged over squares
    of `pool` × `pool` inside of every patch, with the contrast inside of squares and with what
    changes; everywhere else the features themselves. The mean square of the difference of two rows
    of pixels is proportional to

        |Δm|² + std_weight² · |Δs|² + temporal_weight² · |Δp|²

    with the means m and standard deviations s of the pixels of a square, both as mean squares over
    squares, channels and frames. A cell with the change c, the root mean square difference of the
    averages in successive frames of the cell, stands at p = c · (cos, sin)/√2 of an angle that
    grows by the golden angle from step to step of the video. Three steps, for example, are three
    points of a circle around 0 with radius c/√2:

        137.5°  *
                     0      *  0°
                      *  275°

    Cells that look the same and do not change (c = 0) coincide, whatever their step. Cells that
    flash alike in several steps do not: over many steps, the mean square distance of two of them is
    twice the square of the radius, c². So each flash can be kept.
    """
    x, pixels = finite_features(tokens.features).float(), tokens.pixels
    if pixels is None:
        return x
    pictures = x.view(len(x), -1, *pixels[1:])  # (n, pictures, height, width)
    means = _averages(pictures, pool)
    columns = [means.flatten(1)]
    if std_weight and pool > 1:
        # Relative to the mean of a patch, so that the difference of squares loses no digits.
        centre = pictures.mean((2, 3), keepdim=True)
        squares = _averages((pictures - centre).square(), pool)
        deviations = (squares - (means - centre).square()).clamp_(min=0).sqrt_()
        columns.append(std_weight * deviations.flatten(1))
    if temporal_weight and pixels[0] > 1:
        frames = means.view(len(x), -1, pixels[0], *means.shape[2:])
        changes = frames.diff(dim=2).square().mean((1, 2, 3, 4)).sqrt()
        scale = temporal_weight * math.sqrt(columns[0].shape[1] / 2)
        columns.append(scale * changes[:, None] * _steps(tokens))
    return torch.cat(columns, 1)


def with_steps(x: Tensor, tokens: Tokens, weight: float) -> Tensor:
    """Features and what changes from step to step, float32, shape (n, d + 2).

    The two columns are those of `descriptor`, where the change c of a cell is the larger one of the
    root mean square differences to the same cell in the step before and in the step after. Of a
    cell that an earlier stage has dropped, and before the first and after the last step, there is
    no difference. Cells that flash alike in two steps differ by c, times `weight`:

        step           0    1    2    3    4    5
        cell           ·    ✶    ·    ✶    ·    ·       ✶ flashes, · is background
        change c       c    c    c    c    c    0       five different cells instead of two
    """
    cells, areas = tokens.cells(), tokens.per_patch([h * w for _, h, w in tokens.grids])
    ends = tokens.per_patch([math.prod(grid) for grid in tokens.grids])
    first = itertools.accumulate((math.prod(g) for g in tokens.grids[:-1]), initial=0)
    rows = tokens.per_patch([*first]) + cells
    table = x
    if tokens.index is not None:
        table = x.new_full((sum(math.prod(g) for g in tokens.grids), x.shape[1]), math.nan)
        table = table.index_copy(0, rows, x)
    change = x.new_zeros(len(x))
    for step in (-areas, areas):
        there = (cells + step >= 0) & (cells + step < ends)
        other = table.index_select(0, torch.where(there, rows + step, rows))
        difference = (x - other).square().mean(1).sqrt().nan_to_num(0.0)
        change = torch.maximum(change, difference)
    scale = weight * math.sqrt(x.shape[1] / 2)
    return torch.cat([x, scale * change[:, None] * _steps(tokens)], 1)


def _averages(pictures: Tensor, pool: int) -> Tensor:
    """Means over squares of `pool` × `pool` pixels, shape (n, pictures, height', width')."""
    if pool == 1:
        return pictures
    height, width = (max(1, round(side / pool)) for side in pictures.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(pictures, (height, width))


def _steps(tokens: Tokens) -> Tensor:
    """Cosine and sine of the angle of every patch's step in time, float32, shape (n, 2)."""
    pairs = zip(tokens.host_cells(), tokens.grids, strict=True)
    angles = TURN * np.concatenate([cells // (h * w) for cells, (_, h, w) in pairs])
    table = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    return torch.from_numpy(table).to(tokens.device)
