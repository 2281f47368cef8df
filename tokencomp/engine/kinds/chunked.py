"""Layers whose queries see their own chunk of the sequence only (Llama 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokencomp.engine.kinds.base import Windowed

if TYPE_CHECKING:
    from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class Chunked(Windowed):
    """Chunks of `size` columns, counted from the first real one."""

    window_field = "attention_chunk_size"
    counts_from_start = True

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether both lie in one chunk."""
        return (key - start) // size == (query - start) // size

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether columns are missing: transformers counts chunks from logical columns."""
        return self.exceeded(source, total) and segment.gaps
