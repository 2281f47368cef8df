"""Pictures and folders of all kinds come out as they are meant to be seen."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokencomp.errors import MediaError
from tokencomp.inputs.media import load_media


def drawing(seed=0, size=(24, 16)):
    """Colours and transparency at random, and what shows of them on white: uint8 (h, w, 3)."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4)).astype(np.uint8)
    share = values[..., 3:] / 255
    return Image.fromarray(values), values[..., :3] * share + 255 * (1 - share)


def cut_out(seed=0):
    """A drawing whose pixels are opaque or transparent, as GIF has them, in four colours."""
    values = np.random.default_rng(seed).integers(0, 2, (16, 24, 4)).astype(np.uint8) * 255
    values[..., 2] = 40
    return Image.fromarray(values), np.where(values[..., 3:] > 0, values[..., :3], 255)


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


def test_transparent_colours_of_a_palette_are_white(tmp_path):
    palette = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "P")
    palette.putpalette([200, 30, 30, 20, 20, 20, 5, 90, 250])
    palette.save(tmp_path / "one.png", transparency=bytes([0, 255, 255]))
    colours = np.array([[255, 255, 255], [20, 20, 20], [5, 90, 250]])
    assert near(load_media(tmp_path / "one.png"), colours[np.asarray(palette)])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_opaque_pictures_stay_as_they_are(tmp_path, mode):
    picture = drawing()[0].convert("RGB").convert(mode)
    picture.save(tmp_path / "one.png")
    got = np.asarray(load_media(tmp_path / "one.png"))
    assert np.array_equal(got, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_transparent_parts_of_animations_are_white(tmp_path, kind):
    pytest.importorskip("pydantic")
    from tokencomp.serving.limits import Limits
    from tokencomp.serving.video import load_video

    pictures, wanted = zip(*map(cut_out, range(3)), strict=True)
    how = {"disposal": 2} if kind == "gif" else {"lossless": True}
    out = io.BytesIO()
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:], **how)
    (tmp_path / f"one.{kind}").write_bytes(out.getvalue())
    url = f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
    for clip in (load_media(tmp_path / f"one.{kind}", 3), load_video(url, Limits())[0]):
        assert len(clip) == 3 and all(map(near, clip, wanted))


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


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.png", "none.png"])
def test_names_that_no_file_has(name):
    with pytest.raises(MediaError, match="no such file"):
        load_media(name)


@pytest.mark.parametrize("kind", [str, Path])
def test_addresses_are_not_read(kind):
    """A path has lost one of the slashes."""
    with pytest.raises(MediaError, match=r"https://host/a\.png: URLs are not read"):
        load_media(kind("https://host/a.png"))
