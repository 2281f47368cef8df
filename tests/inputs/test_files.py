"""Pictures, folders and clips of all kinds come out as they are meant to be seen."""

from __future__ import annotations

import base64
import io
import struct

import numpy as np
import pytest
from PIL import Image
from support.clips import write_clip

from tokencomp.errors import MediaError
from tokencomp.inputs import images, media
from tokencomp.inputs.media import load_media
from tokencomp.inputs.video import Video
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


def drawing(seed=0, size=(24, 16)):
    """Colours and transparency at random, and what shows of them on white: uint8 (h, w, 3)."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4)).astype(np.uint8)
    share = values[..., 3:] / 255
    return Image.fromarray(values), values[..., :3] * share + 255 * (1 - share)


def near(frame, wanted):
    return np.abs(np.asarray(frame, float) - wanted).max() <= 1.01


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_white(tmp_path, mode):
    picture, wanted = drawing()
    if mode == "LA":
        picture = picture.convert("LA")
        grey, share = np.moveaxis(np.asarray(picture, float), 2, 0)
        wanted = np.repeat((grey * share / 255 + 255 - share)[..., None], 3, 2)
    picture.save(tmp_path / "one.png")
    assert near(load_media(tmp_path / "one.png"), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_opaque_pictures_stay_as_they_are(tmp_path, mode):
    picture = drawing()[0].convert("RGB").convert(mode)
    picture.save(tmp_path / "one.png")
    got = np.asarray(load_media(tmp_path / "one.png"))
    assert np.array_equal(got, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_have_the_times_that_were_written(tmp_path, kind):
    pytest.importorskip("pydantic")
    from tokencomp.serving.limits import Limits
    from tokencomp.serving.video import load_video

    written = [100, 700, 50, 250, 400]
    pictures = [drawing(k)[0].convert("RGB") for k in range(5)]
    out = io.BytesIO()
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:], duration=written)
    (tmp_path / f"one.{kind}").write_bytes(out.getvalue())
    url = f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
    for sampling in (
        load_media(tmp_path / f"one.{kind}", 5).sampling,
        load_video(url, Limits())[1],
    ):
        assert sampling.times == pytest.approx([0, 0.1, 0.8, 0.85, 1.1])
        assert sampling.fps == pytest.approx(5 / 1.5)


def test_numbers_in_names_are_numbers(tmp_path):
    frames = ["frame.png", "frame0.png", "frame1.png", "frame2.jpg", "frame010.png", "frame11.png"]
    names = ["a.png", *frames, "frame11b.png", "shot2_9.png", "shot2_10.png", "shot10_1.png"]
    for level in np.random.default_rng(0).permutation(len(names)):
        Image.new("L", (8, 8), 20 * int(level)).save(tmp_path / names[level])
    levels = [frame.getpixel((0, 0))[0] for frame in load_media(tmp_path, len(names))]
    assert levels == pytest.approx([20 * k for k in range(len(names))], abs=1)


@pytest.mark.parametrize(("name", "count"), [("phone.jpg", 1), ("pages.tiff", 2)])
def test_of_several_pictures_a_photograph_shows_the_first(tmp_path, name, count):
    """Phones write the second into a JPEG (MPO); pages of a TIFF are frames."""
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    kind = {"phone.jpg": "MPO"}.get(name)
    first.save(tmp_path / name, kind, save_all=True, append_images=[second])
    read = load_media(tmp_path / name)
    pages = [read] if isinstance(read, Image.Image) else read
    wanted = np.array([[255, 0, 0], [0, 0, 255]])[:count]
    assert near([page.getpixel((8, 8)) for page in pages], wanted)


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
