"""Where an item ends: the tiles of one image, and the frames of one clip, are spans of one item.

Processors write marker tokens or text between them. `GAPS` has what they write in each family; the
tokenizer in the model's folder reads it. Without one, tiles and frames that only such a text joins
are items of their own, and `warn_of_unknown_items` says so.
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokencomp.errors import RatioWarning
from tokencomp.tokens.tokens import VisualSpan

Part = Literal["tile", "frame"]
"""What a span is of the item of the span before it."""
NEVER = "(?!)"
FAKE = "<fake_token_around_image>"
ROWS = rf"\n*{FAKE}(<row_\d+_col_\d+>|<global-img>)"


@dataclass(frozen=True)
class Gap:
    """What a processor writes between two tiles of an image, and two frames of a clip.

    `tiles` and `frames` are patterns of the whole text. `run`: the tiles of an image are adjacent.
    `ends`: the token before the marker of a tile also closes an image, so that ids alone tell.
    """

    tiles: str = NEVER
    frames: str = NEVER
    run: bool = False
    ends: bool = False


GAPS: dict[str, Gap] = {
    "internvl": Gap(frames=r"</img>\nFrame(?!1:)\d+: <img>", run=True),
    "qianfan_ocr": Gap(run=True),
    "got_ocr2": Gap(run=True),
    "aria": Gap(run=True),
    "perception_lm": Gap(run=True),
    "smolvlm": Gap(ROWS, rf"{FAKE}\nFrame from \d+:\d+:{FAKE}<global-img>", ends=True),
    "idefics3": Gap(ROWS, ends=True),
    "granite_docling": Gap(ROWS),
    "aya_vision": Gap(r"TILE_(\d+|GLOBAL)"),
    "cohere2_vision": Gap(r"<\|IMG_LINE_BREAK\|>"),
    "lfm2_vl": Gap(r"<\|img_row_\d+_col_\d+\|>|<\|img_thumbnail\|>"),
    "ovis2": Gap("<IMG_GRID>|<IMG_COL>|<IMG_ROW>"),
}
"""Model type → what stands inside an item. The model is told the sizes of other families' media, or
their processor writes an item in one run of one span."""


class ItemEnds:
    """Tells whether two spans of a model are parts of one item."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gap = GAPS.get(model.config.model_type)
        self._warned = False

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder that the model was loaded from; None if there is none."""
        names = (
            getattr(self.model, "name_or_path", ""),
            getattr(self.model.config, "_name_or_path", ""),
        )
        folder = next(filter(None, names), "")
        if not folder:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception:  # no tokenizer there, a damaged one, or one of remote code
            return None

    def join(self, rows: list[list[VisualSpan]], ids: Any) -> list[list[VisualSpan]]:
        """The spans of every sample with their items; `ids` (B, L), or None if unknown."""
        if self.gap is None or not any(len(row) > 1 for row in rows):
            return rows
        tokens = itertools.repeat([]) if ids is None else ids.tolist()
        return [self._joined(row, ids) for row, ids in zip(rows, tokens, strict=False)]

    def _joined(self, row: list[VisualSpan], ids: list[int]) -> list[VisualSpan]:
        joined: list[VisualSpan] = []
        for span in row:
            before = joined[-1] if joined else span
            part = self._part(before, span, ids) if joined else None
            tile = before.tile + 1 if part == "tile" else 0
            joined.append(replace(span, item=before.item if part else span.start, tile=tile))
        return joined

    def _part(self, before: VisualSpan, span: VisualSpan, ids: list[int]) -> Part | None:
        """What `span` is of the item of the span `before`; None: it begins an item."""
        gap, between = self.gap, ids[before.stop : span.start]
        if gap is None or before.modality != span.modality:
            return None
        if before.stop == span.start:
            return "tile" if gap.run else None
        if gap.ends and len(between) > 1 and between[-2] not in between[:-2]:
            return "tile"
        if not between or self.tokenizer is None:
            return None
        text = self.tokenizer.decode(between, clean_up_tokenization_spaces=False)
        if re.fullmatch(gap.tiles, text):
            return "tile"
        return "frame" if re.fullmatch(gap.frames, text) else None

    def warn_of_unknown(self, rows: Sequence[Sequence[VisualSpan]]) -> None:
        """Warn once, under a budget per item, if nothing tells which spans are one item."""
        gap = self.gap
        several = any(len({span.item for span in row}) > 1 for row in rows)
        if gap is None or self._warned or not several or {gap.tiles, gap.frames} == {NEVER}:
            return
        if self.tokenizer is not None or (gap.ends and gap.frames == NEVER):
            return
        self._warned = True
        warnings.warn(
            f"{type(self.model).__name__} has no folder with a tokenizer, which tells the frames of"
            " a clip or tiles of an image from other images: the budget is per frame and per tile. "
            "Load the model from its folder, or use budget={'prompt': N} or ratio=.",
            RatioWarning,
            stacklevel=3,
        )
