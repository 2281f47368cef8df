"""What one kind of decoder layer means for masks, windows, scores and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class LayerKind:
    """A kind of decoder layer; this one attends to all tokens before it.

    A new kind is one file with a subclass and one row in `registry`.

    Attributes
    ----------
    name
        As transformers' configs name it, and as decoders find its mask.
    window_field
        Field of the text config with the size of its window, in tokens.
    attends
        Whether it has queries and keys, one row per token, so that its attention can score tokens.
    counts_from_start
        Whether windows are counted from the first real column of every sample.
    skips_masks
        Whether transformers may leave out a mask that hides nothing.
    masks_single_tokens
        Whether the decoder builds a mask for a single token, too.
    cuts_later_turns
        Whether only the first prompt is kept whole, so that later media cannot be served.
    """

    name: str
    window_field: ClassVar[str | None] = None
    attends: ClassVar[bool] = True
    counts_from_start: ClassVar[bool] = False
    skips_masks: ClassVar[bool] = True
    masks_single_tokens: ClassVar[bool] = False
    cuts_later_turns: ClassVar[bool] = False

    def visible(self, query: Any, key: Any, size: int, start: Any) -> Any:
        """Whether the window of a query holds a key before it; without a window it always does.

        Parameters
        ----------
        query, key
            Their columns.
        size
            Of the window.
        start
            First real column of the sample.
        """
        return True

    def misplaced(self, source: Any, segment: Segment, total: int) -> bool:
        """Whether the mask that the decoder builds from a 2-D mask of rows would be wrong.

        Parameters
        ----------
        source
            The `MaskSource` of the call.
        total
            Tokens of the uncompressed sequence after this call.
        """
        return False

    def mask(self, source: Any, segment: Segment, x: Tensor, text: Tensor | None) -> Any:
        """The mask of these layers in a segment.

        Parameters
        ----------
        source
            The `MaskSource` of the call.
        x : Tensor, shape (B, n, d)
            Read for its shape, dtype and device.
        text : Tensor of int64, shape (B, n), or None
            Positions that begin again in every prompt of a packed row; there is no cache then.
        """
        return source.attention_mask(self, segment, x, text, self.skips_masks)


@dataclass(frozen=True)
class Windowed(LayerKind):
    """Layers whose queries see a window, whose size the config gives."""

    def exceeded(self, source: Any, total: int) -> bool:
        """Whether a layer would not see all of a sequence of `total` tokens."""
        size = source.windows.sizes.get(self.name)
        return size is not None and total > size
