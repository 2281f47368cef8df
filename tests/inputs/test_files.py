"""Real files: what is read of mp4 and pictures of many bits, and readable errors."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.clips import pictures, write_clip

from tokencomp.errors import MediaError
from tokencomp.inputs import images, media
from tokencomp.inputs.questions import Example
from tokencomp.zoo.shapesqa.items import item
from tokencomp.zoo.shapesqa.render import render, write_mp4


def as_array(frames):
    """Frames as uint8 (frames, height, width, 3)."""
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    one = item("validation", "needle", 0)
    return one, write_mp4(one.scene, tmp_path_factory.mktemp("clip") / "needle.mp4")


def test_mp4_round_trip(clip):
    one, path = clip
    frames = as_array(media.load_media(path, 8))
    truth = render(one.scene, [k + 0.5 for k in range(8)])  # middles of the logical frames
    assert frames.shape == truth.shape
    assert np.abs(frames.astype(int) - truth).mean() < 9  # lossy, yet the same pictures in order
    distance = [[np.abs(f.astype(int) - t).mean() for t in truth] for f in frames]
    assert np.argmin(distance, 1)[one.evidence.frames[0]] == one.evidence.frames[0]


def test_bad_files(tmp_path, clip):
    with pytest.raises(MediaError, match="no such file"):
        media.load_media(tmp_path / "nothing.png")
    for name in ("empty.mp4", "empty.png"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(MediaError, match="empty"):
            media.load_media(tmp_path / name)
    for name in ("noise.mp4", "noise.png"):
        (tmp_path / name).write_bytes(b"\x00\x01 not a picture" * 50)
        with pytest.raises(MediaError, match=name):
            media.load_media(tmp_path / name)
    (tmp_path / "cut.mp4").write_bytes(clip[1].read_bytes()[:600])
    with pytest.raises(MediaError, match="decoded"):
        media.load_media(tmp_path / "cut.mp4")
    image = tmp_path / "cut.jpg"
    item("validation", "count", 0).image().save(image)
    image.write_bytes(image.read_bytes()[:700])
    with pytest.raises(MediaError, match="damaged"):
        media.load_media(image)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    """Pillow's own conversion cuts them off at 255: white pictures."""
    grey = np.arange(256).reshape(16, 16)
    values = np.minimum(257 * grey + 100, 65535)  # whose lower byte is another one
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
    read = np.asarray(media.load_media(tmp_path / name))
    assert np.array_equal(read, np.repeat(grey[..., None], 3, axis=2))
    old = Image.fromarray(values.astype(np.int32))  # as Pillow 10 reads 16-bit PNG
    assert np.array_equal(np.asarray(images.to_rgb(old)), read)


def test_dark_pictures_of_many_bits(tmp_path):
    """A dark picture of 16 bits stays dark; 32-bit numbers that fill 8 bits are those."""
    dark = np.full((4, 4), 2 * 257, dtype=np.int32)
    (tmp_path / "dark.pgm").write_bytes(b"P5 4 4 65535\n" + dark.astype(">u2").tobytes())
    assert (np.asarray(media.load_media(tmp_path / "dark.pgm")) == 2).all()
    (tmp_path / "black.pgm").write_bytes(b"P5 4 4 65535\n" + bytes(32))
    assert not np.asarray(media.load_media(tmp_path / "black.pgm")).any()
    Image.fromarray(np.full((4, 4), 63, dtype=np.int32)).save(tmp_path / "small.tif")
    assert (np.asarray(media.load_media(tmp_path / "small.tif")) == 63).all()


@pytest.mark.parametrize(
    "values", [np.linspace(0, 1, 16, dtype=np.float32), np.arange(-8, 8), 9999 * np.arange(16)]
)
def test_numbers_of_unknown_range_are_refused(tmp_path, values):
    kind = np.float32 if values.dtype == np.float32 else np.int32
    Image.fromarray(values.astype(kind).reshape(4, 4)).save(tmp_path / "wide.tif")
    with pytest.raises(MediaError, match=r"wide\.tif: a picture of 32-bit numbers"):
        media.load_media(tmp_path / "wide.tif")


@contextlib.contextmanager
def without(path: Path) -> Iterator[None]:
    """Nobody may read or enter the file or folder, also where tests run as root."""
    mode, root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.parametrize("name", ["a.png", "h264.mp4", "a.wav", "frames"])
def test_files_without_permission_fail_by_name(name):
    """So one of them ends no evaluation."""
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are closed to others
        path = Path(folder) / name
        path.parent.chmod(0o755)
        if name == "frames":
            path.mkdir()
            Image.new("RGB", (8, 8)).save(path / "0.png")
        elif name == "a.png":
            Image.new("RGB", (8, 8)).save(path)
        elif name == "a.wav":
            path.write_bytes(b"RIFF")
        else:
            write_clip(path.parent, "h264", pictures(3))
            media.load_media(path)  # imports what reads it, while everything may be read
        example = Example("0", "What?", "x", (str(path),))
        with without(path), pytest.raises(MediaError, match="no permission to read it"):
            example.load(2)
