"""The adapter of all models without a family adapter.

Runs of placeholders are cut into media by the token counts of the encoded ones (`EncodedMedia`).
The grid of a medium comes from the first of these sources: M-RoPE positions, the size that the
encoder was called with, rows between line breaks, the feature map of the tower, a square given by
the config. Without any it is 1×1×n, and unknown.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tokencomp.adapters.base import (
    ENCODED,
    Adapter,
    Encoding,
    MediaCall,
    Run,
    Size,
    runs_of,
    token_counts,
)
from tokencomp.adapters.structure import square_side
from tokencomp.adapters.towers.base import Tower
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.errors import SpanError
from tokencomp.tokens.stacks import HostIndex
from tokencomp.tokens.tokens import Grid, Modality, VisualSpan

PACKED = ("qwen3_5", "qwen3_5_moe")
"""Model types with the vision tower of Qwen3-VL, where the patches of a token are adjacent."""
GivenSize = Callable[[], Size | None]


class StructuralAdapter(Adapter):
    """Finds parts, placeholders, spans and grids by structure.

    Spans are whole media if the token count of each is known, else runs of placeholders.
    """

    # Assumed, because it is unknown: Ministral 3, for example, scales queries by position.
    layers_read_positions = True
    # Whether positions of all media give a grid; otherwise the prompt is refused.
    needs_positions: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._patches = self._patches_per_side()

    @property
    def family(self) -> str:  # type: ignore[override]  # a class variable elsewhere
        return type(self.model).__name__

    def tower_layout(self) -> Tower:
        if self.model.config.model_type not in PACKED:
            return super().tower_layout()
        return PackedTower(self.body.visual, self.model.config.vision_config.patch_size)

    def spans(self, call: MediaCall) -> list[list[VisualSpan]]:
        rows = runs_of(call.modalities)
        modalities: set[Modality] = {modality for runs in rows for _, _, modality in runs}
        encoded = bool(self.feature_modalities(call.inputs))
        encodings = {modality: self.encoding(modality, call, encoded) for modality in modalities}
        media = cut_media(rows, {modality: e.lengths for modality, e in encodings.items()})
        if media is None:
            media = [[Medium(modality, [(a, b)]) for a, b, modality in runs] for runs in rows]
        counts = {
            modality: [sum(medium.modality == modality for medium in row) for row in media]
            for modality in modalities
        }
        numbers = {modality: itertools.count() for modality in modalities}
        spans: list[list[VisualSpan]] = [[] for _ in media]
        for b, row in enumerate(media):
            for medium in row:
                modality = medium.modality
                encoding, number = encodings[modality], next(numbers[modality])
                size = partial(encoding.size, counts[modality], number)
                spans[b] += self.spans_of(medium, b, call, encoding, size)
        return self.item_ends.join(spans, call.inputs.get("input_ids"))

    def encoding(self, modality: Modality, call: MediaCall, encoded: bool) -> Encoding:
        """Encoded media of a modality that belong to a call.

        The last encoding belongs to a call with pixels or encoded features (`encoded`). The source
        of features inside `inputs_embeds` is unknown.
        """
        latest = self.encoded.latest.get(modality)
        if latest is None or not encoded:
            latest = self.described(modality, call)
        handed = call.inputs.get(ENCODED)
        if not isinstance(handed, Mapping) or handed.get(modality) is None:
            return latest
        lengths = token_counts(handed[modality])
        return replace(latest, lengths=lengths) if lengths else latest

    def described(self, modality: Modality, call: MediaCall) -> Encoding:
        """Sizes of media that the body did not encode, from arguments of the call."""
        grids = call.inputs.get(f"{modality}_grid_thw")  # (t, h, w) in patches
        side = getattr(getattr(self.config, "vision_config", None), "spatial_merge_size", None)
        if grids is None or side is None:
            return Encoding()
        return Encoding((grids.prod(-1) // side**2).tolist(), [grids])

    def spans_of(
        self, medium: Medium, row: int, call: MediaCall, encoding: Encoding, size: GivenSize
    ) -> list[VisualSpan]:
        """The spans of one medium: one, or one per piece if text is between its pieces.

        `size` returns (t, h, w) of the medium in any unit; None if unknown. Raises `SpanError` if
        positions give no grid in a family where they always do.
        """
        pieces, modality, grids = medium.pieces, medium.modality, []
        for start, stop in pieces:
            grid: Grid | None = (stop - start, 1, 1)
            if modality != "audio":
                grid = grid_from_positions(call.positions, row, start, stop)
            if self.needs_positions and grid is None:
                raise SpanError(
                    f"visual tokens {start} … {stop - 1} of sample {row} do not form one t×h×w "
                    "grid. Expected whole images or videos, each between its own start and end "
                    "tokens, with the positions the model computes. In a later turn with new media "
                    "pass position_ids of the whole conversation (model.model.get_rope_index)."
                )
            grids.append(grid)
        if len(pieces) == 1:
            grids = [grids[0] or grid_from_size(size(), medium.count)]
        elif modality != "audio":
            joined = _joined(medium, call.embeds[row], grids[0], size)
            if joined is not None:
                return [joined]
        if None in grids:  # neither positions nor a size give them
            first, end = pieces[0]
            guess = (1, *encoding.map) if encoding.map else square(end - first, self._patches)
            grids = [grid or guess for grid in grids]
        spans = []
        for tile, ((start, stop), grid) in enumerate(zip(pieces, grids, strict=True)):
            n, item = stop - start, pieces[0][0]
            known = grid is not None and math.prod(grid) == n
            shape = grid if known and grid is not None else (1, 1, n)
            spans.append(
                VisualSpan(start, n, shape, modality, grid_known=known, item=item, tile=tile)
            )
        return spans

    def _patches_per_side(self) -> int | None:
        """Patches per side of the vision tower's input; None if it is not square."""
        vision = getattr(self.config, "vision_config", None)
        if vision is None or learned_queries(self.body):
            return None
        image, patch = (square_side(getattr(vision, n, None)) for n in ("image_size", "patch_size"))
        return image // patch if image and patch else None


def learned_queries(body: nn.Module) -> bool:
    """Whether image tokens come from learned queries, which have no grid."""
    names = {name.rsplit(".", 1)[-1] for name, _ in body.named_parameters()}
    tables = {
        name.rsplit(".", 1)[-1]
        for name, module in body.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return bool(names & {"query", "queries", "latents", "query_tokens"}) or any(
        name.startswith("query") for name in tables
    )


# -- media cut out of runs of placeholders, and their grids ----------------------------------------


@dataclass
class Medium:
    """Placeholders of one image, video or clip (or of a tile) in a sample."""

    modality: Modality
    pieces: list[tuple[int, int]]

    @property
    def count(self) -> int:
        """Number of placeholders."""
        return sum(stop - start for start, stop in self.pieces)


def cut_media(
    rows: Sequence[list[Run]], lengths: dict[Modality, list[int]]
) -> list[list[Medium]] | None:
    """Assign placeholders to media by their token counts, in the order of the batch, per sample.

    A modality without counts in `lengths` has one medium per run. None if the counts do not match
    the runs, or media of two modalities interleave.
    """
    pending = {
        modality: deque(n for n in counts if n) for modality, counts in lengths.items() if counts
    }
    media: list[list[Medium]] = []
    for runs in rows:
        row, missing = list[Medium](), 0  # `missing` placeholders of the last medium
        for start, stop, modality in runs:
            if modality not in pending and not missing:
                row.append(Medium(modality, [(start, stop)]))
                continue
            while start < stop:
                if not missing:
                    if not pending[modality]:
                        return None
                    missing = pending[modality].popleft()
                    row.append(Medium(modality, []))
                elif row[-1].modality != modality:
                    return None
                taken = min(missing, stop - start)
                row[-1].pieces.append((start, start + taken))
                start, missing = start + taken, missing - taken
        if missing:
            return None
        media.append(row)
    return None if any(pending.values()) else media


def _joined(
    medium: Medium, embeds: Tensor, frame: Grid | None, size: GivenSize
) -> VisualSpan | None:
    """Join equal pieces with gaps into one span, or None.

    Rows of an image are separated by one equal token, a line break, which is special. Frames of a
    video are separated by any text. `embeds` (L, d) are those of the sample; `frame` is the grid of
    the first piece by its positions, or None.
    """
    pieces, start, stop = medium.pieces, medium.pieces[0][0], medium.pieces[-1][1]
    length = pieces[0][1] - start
    if any(b - a != length for a, b in pieces):
        return None
    gaps = [(b, a) for (_, b), (a, _) in itertools.pairwise(pieces)]
    offsets = tuple(column - start for a, b in gaps for column in range(a, b))
    n = len(pieces)
    # Rows of an image between line breaks.
    if _line_breaks(embeds, gaps):
        grid = grid_from_size(size(), medium.count)
        if grid is None or (grid[1], grid[2]) == (n, length):
            return VisualSpan(start, stop - start, (1, n, length), medium.modality, special=offsets)
    if medium.modality != "video":
        return None
    # Frames of a video between text.
    if frame is None:
        whole = grid_from_size(size(), medium.count)
        frame = (1, *whole[1:]) if whole is not None and whole[0] == n else None
    known = frame is not None and math.prod(frame) == length
    grid = (n, frame[1], frame[2]) if known and frame is not None else (n, 1, length)
    return VisualSpan(start, stop - start, grid, medium.modality, text=offsets, grid_known=known)


def _line_breaks(embeds: Tensor, gaps: list[tuple[int, int]]) -> bool:
    """Whether all gaps of a sample (L, d) are one and the same token."""
    if any(b - a != 1 for a, b in gaps):
        return False
    tokens = embeds[[a for a, _ in gaps]]
    return bool((tokens == tokens[0]).all())


def grid_from_positions(
    positions: HostIndex | None, row: int, start: int, stop: int
) -> Grid | None:
    """The grid (t, rows, columns) whose raster order has the positions of columns of a sample.

    `positions` are M-RoPE positions (t, h, w) from any offset, int64 (3, B, L), in NumPy, because
    short tensor operations cost ten times as much. None if they form no grid; three equal rows are
    positions of text.
    """
    if positions is None:
        return None
    time, h, w = positions[:, row, start:stop]
    if len(h) > 1 and np.array_equal(time, h) and np.array_equal(h, w):
        return None
    n, rows, cols = len(h), int(h.max() - h.min()) + 1, int(w.max() - w.min()) + 1
    raster = np.arange(n)
    regular = n % (rows * cols) == 0 and (
        np.array_equal(h - h[0], raster // cols % rows) and np.array_equal(w - w[0], raster % cols)
    )
    return (n // (rows * cols), rows, cols) if regular else None


def grid_from_size(size: Size | None, count: int) -> Grid | None:
    """The grid of `count` tokens of a medium of size (t, h, w) in patches or pixels, or None.

    The unit is found by trial: a token covers u × u of them, in one frame, two frames, or all.
    """
    if size is None or min(size) < 1:
        return None
    frames, height, width = size
    for t in dict.fromkeys((frames, -(-frames // 2), 1)):
        if count % t:
            continue
        unit = math.sqrt(height * width * t / count)
        for u in dict.fromkeys((round(unit), math.floor(unit), math.ceil(unit))):
            if u < 1:
                continue
            for grid in ((t, height // u, width // u), (t, -(-height // u), -(-width // u))):
                if math.prod(grid) == count:
                    return grid
    return None


def square(count: int, patches: int | None) -> Grid | None:
    """A square of `count` tokens, each of whole blocks of a tower's patches per side, or None."""
    side = math.isqrt(count)
    if not patches or side * side != count or patches % side:
        return None
    return 1, side, side
