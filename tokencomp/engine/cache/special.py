"""Cache layers of models that keep more than rows, or not all of them, from which rows have left.

Some hold rows of keys and values beside states of short convolutions.
Unlimited-OCR keeps all rows of the prompt for good, and a window of the rows that follow. The class
of its cache layers stands in the code of that model, so it is not known before one is met.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from tokencomp.engine.cache.layers import CompressedDynamicLayer, CompressedSlidingLayer
from tokencomp.torchlib.cache_classes import HYBRID, HYBRID_SLIDING


class CompressedHybridLayer(CompressedDynamicLayer, HYBRID):  # type: ignore[misc]  # of type Any
    """A layer that attends to all; its states are those after the last row."""

    plain: ClassVar[type] = HYBRID


class CompressedHybridSlidingLayer(CompressedSlidingLayer, HYBRID_SLIDING):  # type: ignore[misc]  # older releases lack it
    """A layer with an attention window; its states are those after the last row."""

    plain = HYBRID_SLIDING


class CompressedReferenceLayer(CompressedDynamicLayer):
    """What every compressed layer of this kind adds to the class of the model.

    Attributes
    ----------
    prefill_length : int
        Rows to be kept for good, as far as they are known before they are written.
    prefill_cumulative_length, cumulative_length : int
        Rows written that are kept for good, and rows written behind them.
    """

    prefill_length: int
    prefill_cumulative_length: int
    cumulative_length: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that a write of `query_length` returns, and columns minus rows of the later ones."""
        self.check_patch()
        plain: Any = self.plain
        rows, evicted = plain.get_mask_sizes(self, query_length)
        return rows, evicted + self.dropped

    def shorten_prompt(self, dropped: int) -> None:
        """Correct the length of the prompt, which `generate` gives before the prefill.

        Without it the first call gives the length, by the rows that it writes.
        """
        if self.prefill_length > self.prefill_cumulative_length:
            self.prefill_length -= dropped

    def _cut(self, rows: int) -> None:
        plain: Any = self.plain
        plain.crop(self, rows - self.rows)


@functools.cache
def compressed_reference(plain: type) -> type:
    """The compressed class of a model's own class of such layers."""
    name, kind = f"Compressed{plain.__name__}", vars(plain)["_layer_type"]
    # transformers would use a subclass that is defined with `_layer_type` for all new caches, so
    # the kind is set afterwards.
    members = {"plain": plain, "_layer_type": None}
    own: Any = type(name, (CompressedReferenceLayer, plain), members)
    own._layer_type = kind
    return own  # type: ignore[no-any-return]  # a class
