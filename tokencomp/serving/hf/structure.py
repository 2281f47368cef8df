"""Structure of GIF and JPEG files, of which a small one can be expensive to read."""

from __future__ import annotations

import re

from tokencomp.serving.hf.errors import RequestError

MAX_SCANS = 100  # of a progressive JPEG, which costs a pass over all its pixels per scan; usual: 10
MAX_SEGMENTS = 1000  # a reader stores them one by one; usual: 10, with large profiles 200

# Codes of segments. In compressed data, a byte 0xFF is followed by 0 or by the mark of a restart.
SEGMENT = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
START_OF_FILE, END, SCAN = 0xD8, 0xD9, 0xDA


def check_jpeg(content: bytes) -> None:
    """Refuse a JPEG of too many scans or segments; other files pass.

    What follows the end of the image is not read, such as the video in a phone's moving photo.
    """
    if content[:2] != b"\xff\xd8":
        return
    place, segments, scans = 2, 0, 0
    while mark := SEGMENT.search(content, place):
        code, place = mark[1][0], mark.end()
        if code == END and scans:
            return
        if code in (START_OF_FILE, END):
            continue
        segments, scans = segments + 1, scans + (code == SCAN)
        for count, limit, what in ((scans, MAX_SCANS, "scans"), (segments, MAX_SEGMENTS, "parts")):
            if count > limit:
                raise RequestError(f"a JPEG of more than {limit} {what}.", 413)
        place += max(int.from_bytes(content[place : place + 2], "big"), 2)


# A GIF: codes of its parts, and bytes of its head, and of what stands before a frame's colours.
EXTENSION, PICTURE, TRAILER = 0x21, 0x2C, 0x3B
HEADER, DESCRIPTOR = 13, 9


def count_frames(content: bytes, limit: int) -> int:
    """Return the number of frames of a GIF, but at most `limit` + 1; 0 for other files.

    Pillow counts to the end. As it does, unknown bytes between two parts are passed over.
    """
    if content[:4] != b"GIF8" or len(content) < HEADER:
        return 0
    place, frames = HEADER + _colours(content[10]), 0
    while place < len(content) and content[place] != TRAILER and frames <= limit:
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
