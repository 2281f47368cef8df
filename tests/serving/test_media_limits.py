"""A few bytes can decode to very many pixels, so pixels are counted before they are decoded."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

import numpy as np
import PIL
from PIL import Image, ImageSequence
from PIL.GifImagePlugin import GifImageFile
from support.serving import media as tiny
from support.serving.prompts import read

from tokencomp.inputs.container import VideoFile
from tokencomp.inputs.frames import frame_indices
from tokencomp.serving import video
from tokencomp.serving.hf.app import SAFE_PILLOW
from tokencomp.serving.hf.prompt import Prompt
from tokencomp.serving.limits import Deadline, Limits, RequestError
from tokencomp.serving.media import count_frames, load_image
from tokencomp.serving.video import load_video

LIMITS = Limits(max_pixels=40_000, max_total_pixels=100_000)


def encoded(side: int, kind: str = "PNG") -> str:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


def image(side: int) -> str:
    return "data:image/png;base64," + encoded(side)


def frames(side: int, count: int) -> str:
    return "data:video/jpeg;base64," + ",".join([encoded(side)] * count)


def clip(side: int, count: int) -> str:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for array in tiny.video(1, count, side, side):
            for packet in stream.encode(av.VideoFrame.from_ndarray(array)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return "data:video/mp4;base64," + base64.b64encode(out.getvalue()).decode()


def gif(side: int, count: int) -> str:
    out = io.BytesIO()
    pictures = [Image.new("RGB", (side, side), (9 * i, 0, 0)) for i in range(count)]
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:])
    return "data:image/gif;base64," + base64.b64encode(out.getvalue()).decode()


def parsed(limits: Limits, *urls: str) -> Prompt:
    """Return the prompt of a request with these media, for a model that takes any text."""
    return read(request(*urls), limits=limits)


def request(*urls: str) -> dict[str, Any]:
    parts = []
    for url in urls:
        kind = "image_url" if url.startswith("data:image/png") else "video_url"
        parts.append({"type": kind, kind: {"url": url}})
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("make", [frames, clip, gif])
def test_all_frames_of_a_video_count(make: Any) -> None:
    limits = Limits(max_pixels=40_000, max_total_pixels=100_000, frames=8)
    assert load_video(make(96, 8), limits)[0].shape == (8, 96, 96, 3)
    assert len(load_video(make(128, 6), limits)[0]) == 6
    with pytest.raises(RequestError, match="Send fewer or smaller") as error:
        load_video(make(128, 8), limits)
    assert error.value.status == 413


def test_a_single_image_has_its_own_limit() -> None:
    assert load_image(image(200), LIMITS).size == (200, 200)
    with pytest.raises(RequestError, match="40000"):
        load_image(image(201), LIMITS)


def test_a_damaged_image_is_told_from_another_kind_of_file() -> None:
    head, _, content = image(200).partition(",")
    half = base64.b64encode(base64.b64decode(content)[:-30]).decode()
    with pytest.raises(RequestError, match="an image is damaged"):
        load_image(f"{head},{half}", LIMITS)
    with pytest.raises(RequestError, match="cannot be read; allowed: PNG"):
        load_image(f"{head},{base64.b64encode(b'hello').decode()}", LIMITS)


def test_all_media_of_a_request_count_together() -> None:
    prompt = parsed(LIMITS, image(200), frames(100, 4), image(100))
    assert prompt.pixels == 200 * 200 + 4 * 100 * 100 + 100 * 100
    for urls in ([image(200)] * 3, [image(200), frames(100, 7)], [frames(100, 7), image(200)]):
        with pytest.raises(RequestError, match="left"):
            parsed(LIMITS, *urls)


def large_canvas(side: int, count: int) -> str:
    """Return a GIF of `count` pictures of one pixel on a canvas of `side` × `side`."""
    size = side.to_bytes(2, "little")
    header = b"GIF89a" + size * 2 + b"\x80\x00\x00" + bytes(3) + b"\xff" * 3
    picture = b"\x2c" + bytes(4) + b"\x01\x00\x01\x00\x00" + b"\x02\x02\x44\x01\x00"
    content = header + picture * count + b"\x3b"
    return "data:image/gif;base64," + base64.b64encode(content).decode()


def test_frames_that_are_not_sampled_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """45 kB that cost 15 seconds and 2.8 GB to decode are refused before a frame is decoded."""
    url, decoded = large_canvas(3000, 3000), []
    assert len(url) < 64_000
    with monkeypatch.context() as patched:
        patched.setattr(GifImageFile, "load", lambda image: decoded.append(image.tell()))
        with pytest.raises(RequestError, match="3000 frames of 3000×3000") as error:
            load_video(url, Limits())
    assert error.value.status == 413 and not decoded
    with pytest.raises(RequestError, match="may have 1000000000 pixels"):
        load_video(large_canvas(1001, 1000), Limits())
    assert load_video(large_canvas(30, 300), Limits(frames=8))[0].shape == (8, 30, 30, 3)
    few = Limits(max_decoded_pixels=20 * 96 * 96, max_animated_pixels=20 * 96 * 96)
    assert len(load_video(clip(96, 20), few)[0]) == 20
    monkeypatch.setattr(VideoFile, "frames", None)  # the number of packets is enough
    with pytest.raises(RequestError, match="21 frames of 96×96"):
        load_video(clip(96, 21), few)


def test_frames_of_a_gif_are_counted_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes 13 seconds to count the frames of a GIF of 48 MB to their end."""
    options = {"save_all": True, "duration": 40, "loop": 0, "comment": b"note " * 200}
    for count in (1, 2, 7, 40):
        pictures = [Image.effect_noise((40, 30), 90).convert("P") for _ in range(count)]
        out = io.BytesIO()
        pictures[0].save(out, "GIF", append_images=pictures[1:], **options)
        for content in (out.getvalue(), out.getvalue()[:-1], out.getvalue() + b"x" * 99):
            assert count_frames(content, 99) == Image.open(io.BytesIO(content)).n_frames == count
        assert count_frames(out.getvalue(), 3) == min(count, 4)
        for end in range(0, len(out.getvalue()), 7):  # damaged files
            assert 0 <= count_frames(out.getvalue()[:end], 99) <= count
    places: list[int] = []
    seek = GifImageFile._seek
    monkeypatch.setattr(
        GifImageFile, "_seek", lambda image, n, *more: places.append(n) or seek(image, n, *more)
    )
    with pytest.raises(RequestError, match="more than 500 frames"):
        load_video(large_canvas(30, 4000), Limits(max_decoded=500))
    assert max(places) < 10


@pytest.mark.parametrize("make", [frames, clip, gif, large_canvas])
def test_decoding_ends_with_its_time(make: Any) -> None:
    deadline = Deadline(60)
    assert len(load_video(make(64, 5), Limits(), deadline)[0]) == 5
    deadline.cancel()
    with pytest.raises(RequestError, match="not decoded within 60 s") as error:
        load_video(make(64, 5), Limits(), deadline)
    assert error.value.status == 413
    with pytest.raises(RequestError, match="within 0 s"):
        parsed(Limits(decode_seconds=0), image(8))


def test_sampled_frames_are_those_of_a_whole_decode() -> None:
    av = pytest.importorskip("av")
    url = clip(64, 21)
    content = base64.b64decode(url.partition(",")[2])
    with av.open(io.BytesIO(content)) as opened:
        every = [f.to_ndarray(format="rgb24") for f in opened.decode(video=0)]
    expected = np.stack([every[i] for i in frame_indices(21, 8)])
    assert np.array_equal(load_video(url, Limits(frames=8))[0], expected)
    animated = gif(64, 21)
    pictures = Image.open(io.BytesIO(base64.b64decode(animated.partition(",")[2])))
    every = [np.asarray(p.convert("RGB")) for p in ImageSequence.Iterator(pictures)]
    expected = np.stack([every[i] for i in frame_indices(21, 8)])
    assert np.array_equal(load_video(animated, Limits(frames=8))[0], expected)


def test_a_file_has_the_limit_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(base64.b64decode(encoded(8)))
    size = (tmp_path / "image.png").stat().st_size
    url = (tmp_path / "image.png").as_uri()
    assert load_image(url, Limits(allowed_path=tmp_path, max_bytes=size)).size == (8, 8)
    with pytest.raises(RequestError, match=f"the limit is {size - 1}") as error:
        load_image(url, Limits(allowed_path=tmp_path, max_bytes=size - 1))
    assert error.value.status == 413


def test_an_image_of_too_many_pixels_is_too_large_rather_than_damaged() -> None:
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", b"")):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    with pytest.raises(RequestError, match="more pixels than the limit of 50000000") as error:
        load_image("data:image/png;base64," + base64.b64encode(content).decode(), Limits())
    assert error.value.status == 413


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_parts_are_white(mode: str) -> None:
    """The left half is transparent; what colour it hides must not reach the model."""
    picture, options = Image.new("RGBA", (8, 8), (200, 30, 30, 0)), {}
    picture.paste((20, 20, 20, 255), (4, 0, 8, 8))
    if mode in ("P", "L", "RGB"):
        colors = picture.convert("RGB")
        hidden = colors.quantize(2) if mode == "P" else colors.convert(mode)
        options = {"transparency": hidden.getpixel((0, 0))}
        picture = hidden
    elif mode == "LA":
        picture = picture.convert("LA")
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    result = load_image(url, Limits())
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((7, 0)) == (20, 20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(kind: str) -> None:
    """Each scan passes over all pixels, so a few kilobytes of them take minutes."""
    out, picture = io.BytesIO(), Image.new("L", (64, 64), 128)
    several = {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
    picture.save(out, kind, progressive=True, **several)
    content = out.getvalue()
    end = content.index(b"\xff\xd9")
    scan = content[content.rindex(b"\xff\xc4", 0, content.rindex(b"\xff\xda", 0, end)) : end]
    for count, refused in ((50, False), (200, True)):
        bomb = content[:end] + scan * count + content[end:]
        assert Image.open(io.BytesIO(bomb)).format == kind
        # What follows the end of the picture, such as the film in a moving photo, does not count.
        url = "data:image/jpeg;base64," + base64.b64encode(bomb + scan * 200).decode()
        if not refused:
            assert load_image(url, Limits()).size == (64, 64)
            continue
        with pytest.raises(RequestError, match="100 scans") as error:
            load_image(url, Limits())
        assert error.value.status == 413


@pytest.mark.parametrize("filler", [b"\xff\xef\0\2", b"\xff\xfe\0\2", b"\xff\xff\xef\0\2"])
def test_a_jpeg_of_many_parts_is_refused_before_it_is_opened(
    filler: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow stores each of them; 64 MB of parts took 2 GB of memory."""
    out = io.BytesIO()
    Image.new("L", (64, 64), 128).save(out, "JPEG")
    content = out.getvalue()

    def url(count: int) -> str:
        bomb = content[:2] + filler * count + content[2:]
        return "data:image/jpeg;base64," + base64.b64encode(bomb).decode()

    assert load_image(url(900), Limits()).size == (64, 64)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(RequestError, match="1000 parts") as error:
        load_image(url(2000), Limits())
    assert error.value.status == 413


def exif_bomb(entries: int, size: int) -> bytes:
    """Return a PNG whose EXIF directory has many entries that name the same `size` bytes."""
    start = 8 + 2 + 12 * entries + 4
    exif = struct.pack("<4sIH", b"II*\0", 8, entries)
    exif += b"".join(struct.pack("<HHII", 1000 + i, 7, size, start) for i in range(entries))
    exif += bytes(4 + size)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\0")
    for name, data in ((b"IHDR", header), (b"eXIf", exif), (b"IDAT", pixels), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    return content


def test_exif_data_do_not_multiply() -> None:
    url = "data:image/png;base64," + base64.b64encode(exif_bomb(400, 1 << 20)).decode()
    if int(PIL.__version__.split(".")[0]) < SAFE_PILLOW:  # the server warns about it at its start
        pytest.skip("this Pillow reads the data of every entry")
    tracemalloc.start()
    try:
        assert load_image(url, Limits()).size == (1, 1)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_is_larger_than_the_header_says_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    av = pytest.importorskip("av")
    out, sizes = io.BytesIO(), []
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for i, side in enumerate((64, 64, 400, 64)):
            picture = io.BytesIO()
            Image.new("RGB", (side, side)).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.time_base = stream, i, Fraction(1, 4)
            container.mux(packet)
    monkeypatch.setattr(video, "check_size", lambda w, h, *_: sizes.append((w, h)))
    url = "data:video/x-matroska;base64," + base64.b64encode(out.getvalue()).decode()
    with pytest.raises(RequestError):
        load_video(url, LIMITS)
    assert set(sizes) == {(64, 64)}
