"""Values of columns as those of visual tokens, and of the text behind them."""

from __future__ import annotations

from torch import Tensor

from tokencomp.engine.rows.layout import RowLayout, visual_places


def visual_values(values: Tensor, layout: RowLayout) -> Tensor:
    """One value per column, (B, width), as one per visual token that is left, (tokens,)."""
    return values.flatten().index_select(0, visual_places(layout, values.device))


def text_values(values: Tensor, layout: RowLayout) -> list[list[Tensor]]:
    """Values of the columns (B, width) behind the last span of every prompt of every row."""
    result = []
    for b, prompts in enumerate(layout.prompts):
        stops = [max((s.stop for s in layout.spans[b] if p.holds(s)), default=0) for p in prompts]
        result.append([values[b, a : p.question_stop] for a, p in zip(stops, prompts, strict=True)])
    return result
