"""Values of columns as those of visual tokens, and of the text behind them."""

from __future__ import annotations

from torch import Tensor

from tokencomp.engine.rows.layout import RowLayout, visual_places


def visual_values(values: Tensor, layout: RowLayout) -> Tensor:
    """One value per column, (B, width), as one per visual token that is left, (tokens,)."""
    return values.flatten().index_select(0, visual_places(layout, values.device))


def text_values(values: Tensor, layout: RowLayout) -> list[list[Tensor]]:
    """Values (B, width, …) of the text behind the last span of every prompt of every row."""
    return [
        [values[b, layout.question_text(b, prompt)] for prompt in prompts]
        for b, prompts in enumerate(layout.prompts)
    ]
