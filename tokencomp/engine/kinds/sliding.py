"""Layers whose queries see the last tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokencomp.engine.kinds.base import Windowed

if TYPE_CHECKING:
    from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class Sliding(Windowed):
    """A window of the last `size` columns, the query's own among them."""

    window_field = "sliding_window"

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether fewer than `size` columns lie between them."""
        return key > query - size

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether a column has left the window of a query: transformers counts rows."""
        if not source.by_column or not self.exceeded(source, total):
            return False
        return segment.gaps_within(source.windows.sizes[self.name])
