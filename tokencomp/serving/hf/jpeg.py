"""Structure of a JPEG file, which can make a small file expensive to read."""

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

    Raises
    ------
    RequestError
        With status 413.
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
