"""Structure of a GIF file, which can have millions of frames."""

from __future__ import annotations

EXTENSION, PICTURE, END = 0x21, 0x2C, 0x3B
HEADER, DESCRIPTOR = 13, 9  # bytes of the head, and of what stands before the colours of a frame


def count_frames(content: bytes, limit: int) -> int:
    """Return the number of frames of a GIF, but at most `limit` + 1; 0 for other files.

    Pillow counts to the end. As it does, unknown bytes between two parts are passed over.
    """
    if content[:4] != b"GIF8" or len(content) < HEADER:
        return 0
    place, frames = HEADER + _colours(content[10]), 0
    while place < len(content) and content[place] != END and frames <= limit:
        kind, place = content[place], place + 1
        if kind == PICTURE:
            frames += 1
            flags = content[place + DESCRIPTOR - 1] if place + DESCRIPTOR <= len(content) else 0
            place = _after_blocks(content, place + DESCRIPTOR + _colours(flags) + 1)
        elif kind == EXTENSION:
            place = _after_blocks(content, place + 1)
    return frames


def _colours(flags: int) -> int:
    """Return the size of the table of colours that `flags` announce, in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(content: bytes, place: int) -> int:
    """Return the place after a list of blocks, each of which has its length before it."""
    while place < len(content) and content[place]:
        place += 1 + content[place]
    return place + 1
