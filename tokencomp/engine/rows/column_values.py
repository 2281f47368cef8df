"""Values of columns as those of visual tokens, and of the text behind them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.rows.layout import RowLayout


def visual_values(values: Tensor, layout: RowLayout) -> Tensor:
    """One value per column, (B, width), as one per visual token that is left, (tokens,)."""
    return values.flatten().index_select(0, visual_places(layout, values.device))


def text_values(values: Tensor, layout: RowLayout) -> list[list[Tensor]]:
    """Values (B, width, …) of the text behind the last span of every prompt of every row."""
    return [
        [values[b, layout.question_text(b, prompt)] for prompt in prompts]
        for b, prompts in enumerate(layout.prompts)
    ]


def kept_values(values: Tensor, before: RowLayout, after: RowLayout, index: Tensor) -> Tensor:
    """What is left of one value per visual token, (tokens,), when those of `after` stay.

    Parameters
    ----------
    index : Tensor of int64, shape (B, width of `after`)
        Column of `before` for every column of `after`.
    """
    table = values.new_zeros(index.shape[0] * before.width)
    table[visual_places(before, values.device)] = values
    left = table.view(-1, before.width).gather(1, index).flatten()
    return left[visual_places(after, values.device)]


def visual_places(layout: RowLayout, device: torch.device) -> Tensor:
    """Flat places (sample · width + column) of all visual tokens that are left, in order."""
    places = [
        np.arange(live.start, live.stop) + b * layout.width
        for b, row in enumerate(layout.spans)
        for live in row
    ]
    return torch.from_numpy(np.concatenate(places)).to(device)
