"""Spans of any model: media cut out of runs of placeholders, and their grids.

The grid comes from the first of these sources: M-RoPE positions, the size that the encoder was
called with, rows between line breaks, the feature map of the tower, a square given by the config.
Without any it is 1×1×n, and unknown.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tokencomp.adapters.media_call import MediaCall
from tokencomp.tokens.spans import Grid, Modality, VisualSpan

Run = tuple[int, int, Modality]
Size = tuple[int, int, int]
GivenSize = Callable[[], Size | None]


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
    """Assign placeholders to media by token counts of the encoded media, in the order of the batch.

    Parameters
    ----------
    lengths
        Token counts by modality. Without counts, every run is a medium.

    Returns
    -------
    list per sample of list of Medium, or None
        None if the counts do not match the runs, or media of two modalities interleave.
    """
    pending = {
        modality: deque(n for n in counts if n) for modality, counts in lengths.items() if counts
    }
    media = []
    for runs in rows:
        own = _cut_row(runs, pending)
        if own is None:
            return None
        media.append(own)
    return None if any(pending.values()) else media


def _cut_row(runs: list[Run], pending: dict[Modality, deque[int]]) -> list[Medium] | None:
    media: list[Medium] = []
    missing = 0
    for start, stop, modality in runs:
        if modality not in pending and not missing:
            media.append(Medium(modality, [(start, stop)]))
            continue
        while start < stop:
            if not missing:
                if not pending[modality]:
                    return None
                missing = pending[modality].popleft()
                media.append(Medium(modality, []))
            elif media[-1].modality != modality:
                return None
            taken = min(missing, stop - start)
            media[-1].pieces.append((start, start + taken))
            start, missing = start + taken, missing - taken
    return None if missing else media


def span_of(
    medium: Medium, row: int, call: MediaCall, size: GivenSize, fallback: GivenSize
) -> list[VisualSpan]:
    """The spans of one medium: one, or one per piece if text is between its pieces.

    Parameters
    ----------
    size
        Returns (t, h, w) of the medium in any unit; None if unknown.
    fallback
        Returns the grid of a medium if no argument of the call gives it, or None.
    """
    if medium.modality == "audio":
        item = medium.pieces[0][0]
        spans = [_span(a, b, "audio", (b - a, 1, 1)) for a, b in medium.pieces]
        return [replace(span, item=item) for span in spans]
    if len(medium.pieces) == 1:
        start, stop = medium.pieces[0]
        grid = call.raster(row, start, stop)
        grid = grid or grid_from_size(size(), stop - start) or fallback()
        return [_span(start, stop, medium.modality, grid)]
    joined = _joined(medium, row, call, size)
    if joined is not None:
        return [joined]
    item = medium.pieces[0][0]
    grids = [call.raster(row, a, b) for a, b in medium.pieces]
    return [
        replace(_span(a, b, medium.modality, grid or fallback()), item=item)
        for (a, b), grid in zip(medium.pieces, grids, strict=True)
    ]


def _span(start: int, stop: int, modality: Modality, grid: Grid | None) -> VisualSpan:
    known = grid is not None and math.prod(grid) == stop - start
    shape = grid if known and grid is not None else (1, 1, stop - start)
    return VisualSpan(start, stop - start, shape, modality, grid_known=known)


def _joined(medium: Medium, row: int, call: MediaCall, size: GivenSize) -> VisualSpan | None:
    """Join equal pieces with gaps into one span, or None.

    Rows of an image are separated by one equal token, a line break, which is special. Frames of a
    video are separated by any text.
    """
    pieces, start, stop = medium.pieces, medium.pieces[0][0], medium.pieces[-1][1]
    length = pieces[0][1] - start
    if any(b - a != length for a, b in pieces):
        return None
    gaps = [(b, a) for (_, b), (a, _) in itertools.pairwise(pieces)]
    offsets = tuple(column - start for a, b in gaps for column in range(a, b))
    n = len(pieces)
    # Rows of an image between line breaks.
    if _line_breaks(call.embeds[row], gaps):
        grid = grid_from_size(size(), medium.count)
        if grid is None or (grid[1], grid[2]) == (n, length):
            return VisualSpan(start, stop - start, (1, n, length), medium.modality, special=offsets)
    if medium.modality != "video":
        return None
    # Frames of a video between text.
    frame = call.raster(row, *pieces[0])
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
            for grid in _divided(t, height, width, u):
                if math.prod(grid) == count:
                    return grid
    return None


def _divided(t: int, height: int, width: int, unit: int) -> Iterator[Grid]:
    if unit >= 1:
        yield t, height // unit, width // unit
        yield t, -(-height // unit), -(-width // unit)


def square(count: int, patches: int | None) -> Grid | None:
    """A square of `count` tokens, each of whole blocks of a tower's patches per side, or None."""
    side = math.isqrt(count)
    if not patches or side * side != count or patches % side:
        return None
    return 1, side, side
