"""Clips that a phone stores on their side come out as a player shows them."""

from __future__ import annotations

import base64
import struct

import numpy as np
import pytest
from support.clips import write_clip

from tokencomp.inputs.media import load_media
from tokencomp.inputs.video import Video

pytest.importorskip("av")
ONE, WIDTH, HEIGHT = 1 << 16, 96, 64
SHOWN = {
    "as it is": ((1, 0, 0, 1), lambda p: p),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "head down": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "anticlockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "mirrored, then clockwise": ((0, -1, -1, 0), lambda p: np.rot90(np.fliplr(p), -1)),
}
"""The matrix (a, b, c, d) of a phone, and what a player makes of the stored picture."""


@pytest.fixture(params=SHOWN)
def turned(request, tmp_path):
    """A clip whose corners differ, and the picture that a player shows."""
    (a, b, c, d), show = SHOWN[request.param]
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stored[:32, :48], stored[:32, 48:], stored[32:, :48] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = write_clip(tmp_path, "h264", np.repeat(stored[None], 8, 0))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # the matrix in version 0 of the box
    assert content[at : at + 4] == struct.pack(">i", ONE)
    x, y = WIDTH * (a < 0) + HEIGHT * (c < 0), WIDTH * (b < 0) + HEIGHT * (d < 0)
    rows = (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, x * ONE, y * ONE, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", *rows)
    path.write_bytes(content)
    return path, show(stored)


def same(frame, wanted):
    got = np.asarray(frame).astype(int)
    return got.shape == wanted.shape and np.abs(got - wanted).mean() < 4


@pytest.mark.parametrize("frames", [2, "stream:2"])
def test_frames_are_upright(turned, frames):
    path, wanted = turned
    clip = load_media(path, frames)
    assert isinstance(clip, Video) and all(same(frame, wanted) for frame in clip)


def test_smaller_frames_are_upright(turned):
    path, wanted = turned
    (frame,) = load_media(path, 1, size=48)
    assert same(frame, wanted[::2, ::2])


def test_servers_show_the_same(turned):
    pytest.importorskip("pydantic")
    from tokencomp.serving.limits import Limits
    from tokencomp.serving.video import load_video

    path, wanted = turned
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    frames, _ = load_video(url, Limits(frames=2))
    assert len(frames) == 2 and all(same(frame, wanted) for frame in frames)
