"""Cache layers with rows of keys and states of short convolutions, from which rows have left."""

from __future__ import annotations

from typing import Any, ClassVar

from tokencomp.engine.cache.layers import CompressedDynamicLayer, CompressedSlidingLayer
from tokencomp.torchlib import compat

HYBRID: Any = compat.hybrid_layer(sliding=False)
HYBRID_SLIDING: Any = compat.hybrid_layer(sliding=True)


class CompressedHybridLayer(CompressedDynamicLayer, HYBRID):  # type: ignore[misc]  # older releases lack it
    """A layer that attends to all; its states are those after the last row."""

    plain: ClassVar[type] = HYBRID

    def crop(self, length: int) -> None:
        """Remove `-length` rows, and go back as many states."""
        compat.linear_layer().crop(self, length)
        super().crop(length)


class CompressedHybridSlidingLayer(CompressedSlidingLayer, HYBRID_SLIDING):  # type: ignore[misc]  # older releases lack it
    """A layer with an attention window; its states are those after the last row."""

    plain = HYBRID_SLIDING

    def crop(self, length: int) -> None:
        """Remove `-length` rows, and go back as many states."""
        compat.linear_layer().crop(self, length)
        super().crop(length)
