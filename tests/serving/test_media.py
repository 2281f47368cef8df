"""Images and videos of requests: a few bytes can decode to very many pixels, or take minutes.

Video files are decoded in a process of their own, whose end is only a refused request.
"""

from __future__ import annotations

import io
import struct
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest

pytest.importorskip("starlette")
pytest.importorskip("av")

from PIL import Image, ImageSequence
from PIL.GifImagePlugin import GifImageFile
from support.clips import damage, decodable, pictures, without, write_clip
from support.serving.doors import part, user
from support.serving.files import canvas, clip, content, data, frames, gif, image, png
from support.serving.prompts import read

from tokencomp.inputs.media import load_media
from tokencomp.inputs.video.container import VideoFile
from tokencomp.inputs.video.frames import frame_indices
from tokencomp.serving import video
from tokencomp.serving.hf.app import SAFE_PILLOW
from tokencomp.serving.limits import Deadline, Limits, RequestError
from tokencomp.serving.media import count_frames, load_image
from tokencomp.serving.video import decode_apart, decode_container, load_video, with_request


def refused(status: int, call: Any, *arguments: Any) -> str:
    """Require a refusal with this status, and return its message."""
    with pytest.raises(RequestError) as error:
        call(*arguments)
    assert error.value.status == status, str(error.value)
    return str(error.value)


# -- pixels ---------------------------------------------------------------------------------------

LIMITS = Limits(max_pixels=40_000, max_total_pixels=100_000, frames=8)


@pytest.mark.parametrize("make", [frames, clip, gif])
def test_all_frames_of_a_video_count(make: Any) -> None:
    assert load_video(make(96, 8), LIMITS)[0].shape == (8, 96, 96, 3)
    assert len(load_video(make(128, 6), LIMITS)[0]) == 6
    refused(413, load_video, make(128, 8), LIMITS)
    refused(413, load_video, make(208, 1), LIMITS)


def test_all_media_of_a_request_count_together() -> None:
    """Of images alone and lists of frames, see test_doors."""
    parts = [part(url) for url in (image(200), clip(100, 4), image(100))]
    prompt = read(user(*parts), limits=LIMITS)
    assert prompt.pixels == 200 * 200 + 4 * 100 * 100 + 100 * 100
    for urls in ([image(200), clip(100, 7)], [gif(100, 7), image(200)]):
        refused(413, lambda urls=urls: read(user(*map(part, urls)), limits=LIMITS))


def test_frames_that_are_not_sampled_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """45 kB that cost 15 seconds and 2.8 GB to decode are refused before a frame is decoded."""
    url, decoded = canvas(3000, 3000), []
    assert len(url) < 64_000
    with monkeypatch.context() as patched:
        patched.setattr(GifImageFile, "load", lambda image: decoded.append(image.tell()))
        refused(413, load_video, url, Limits())
    assert not decoded
    refused(413, load_video, canvas(1001, 1000), Limits())
    assert load_video(canvas(30, 300), Limits(frames=8))[0].shape == (8, 30, 30, 3)
    few = Limits(max_decoded_pixels=20 * 96 * 96, max_animated_pixels=20 * 96 * 96)
    assert len(load_video(clip(96, 20), few)[0]) == 20
    monkeypatch.setattr(VideoFile, "frames", None)  # the number of packets is enough
    refused(413, load_video, clip(96, 21), few)


def test_frames_of_a_gif_are_counted_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes 13 seconds to count the frames of a GIF of 48 MB to their end."""
    options = {"save_all": True, "duration": 40, "loop": 0, "comment": b"note " * 200}
    for count in (1, 2, 7, 40):
        noise = [Image.effect_noise((40, 30), 90).convert("P") for _ in range(count)]
        out = io.BytesIO()
        noise[0].save(out, "GIF", append_images=noise[1:], **options)
        for whole in (out.getvalue(), out.getvalue()[:-1], out.getvalue() + b"x" * 99):
            assert count_frames(whole, 99) == Image.open(io.BytesIO(whole)).n_frames == count
        assert count_frames(out.getvalue(), 3) == min(count, 4)
        for end in range(0, len(out.getvalue()), 7):  # damaged files
            assert 0 <= count_frames(out.getvalue()[:end], 99) <= count
    seek, places = GifImageFile._seek, list[int]()
    watched = lambda file, n, *more: places.append(n) or seek(file, n, *more)  # noqa: E731
    monkeypatch.setattr(GifImageFile, "_seek", watched)
    refused(413, load_video, canvas(30, 4000), Limits(max_decoded=500))
    assert max(places) < 10


@pytest.mark.parametrize("make", [frames, clip, gif, canvas])
def test_decoding_ends_with_its_time(make: Any) -> None:
    """Media that take minutes to decode, within all limits of size."""
    deadline = Deadline(60)
    assert len(load_video(make(64, 5), Limits(), deadline)[0]) == 5
    deadline.cancel()
    refused(413, load_video, make(64, 5), Limits(), deadline)
    refused(413, lambda: read(user(part(make(8, 2))), limits=Limits(decode_seconds=0)))


def photographs(*sides: int) -> bytes:
    """A video of JPEG frames with these sides, the first of which is in its header."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = sides[0], sides[0], "yuvj420p"
        for i, side in enumerate(sides):
            picture = io.BytesIO()
            Image.new("RGB", (side, side), (60 * i, 90, 0)).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.time_base = stream, i, Fraction(1, 4)
            container.mux(packet)
    return out.getvalue()


def test_a_frame_that_is_larger_than_the_header_says_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decompression bomb: a frame of gigapixels after a small header."""
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(video, "check_size", lambda w, h, *_: sizes.append((w, h)))
    with pytest.raises(RequestError):
        load_video(data(photographs(64, 64, 400, 64), "video/x-matroska"), LIMITS)
    assert set(sizes) == {(64, 64)}


# -- images ---------------------------------------------------------------------------------------


def test_images_are_upright_and_their_transparent_parts_white() -> None:
    """What colour they hide must not reach the model."""
    picture, exif, out = Image.new("RGBA", (8, 4), (200, 30, 30, 0)), Image.Exif(), io.BytesIO()
    picture.paste((20, 20, 20, 255), (4, 0, 8, 4))
    exif[274] = 6  # to be turned
    picture.save(out, "PNG", exif=exif)
    result = load_image(data(out.getvalue()), Limits())
    assert result.size == (4, 8) and result.mode == "RGB"
    assert result.getpixel((0, 0)) == (255, 255, 255) and result.getpixel((0, 7)) == (20, 20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(kind: str) -> None:
    """Each scan passes over all pixels, so a few kilobytes of them take minutes."""
    out, picture = io.BytesIO(), Image.new("L", (64, 64), 128)
    several = {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
    picture.save(out, kind, progressive=True, **several)
    whole = out.getvalue()
    end = whole.index(b"\xff\xd9")
    scan = whole[whole.rindex(b"\xff\xc4", 0, whole.rindex(b"\xff\xda", 0, end)) : end]

    def url(count: int) -> str:
        bomb = whole[:end] + scan * count + whole[end:]
        assert Image.open(io.BytesIO(bomb)).format == kind
        # What follows the end of the picture, such as the film in a moving photo, does not count.
        return data(bomb + scan * 200, "image/jpeg")

    assert load_image(url(50), Limits()).size == (64, 64)
    refused(413, load_image, url(200), Limits())
    early = whole[:2] + b"\xff\xd9" + whole[2:end] + scan * 200 + whole[end:]
    refused(413, load_image, data(early, "image/jpeg"), Limits())  # an end before the first scan


@pytest.mark.parametrize("filler", [b"\xff\xef\0\2", b"\xff\xfe\0\2", b"\xff\xff\xef\0\2"])
def test_a_jpeg_of_many_parts_is_refused_before_it_is_opened(
    filler: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow stores each of them; 64 MB of parts took 2 GB of memory."""
    out = io.BytesIO()
    Image.new("L", (64, 64), 128).save(out, "JPEG")
    url = lambda n: data(out.getvalue()[:2] + filler * n + out.getvalue()[2:])  # noqa: E731
    assert load_image(url(900), Limits()).size == (64, 64)
    monkeypatch.setattr(Image, "open", None)
    refused(413, load_image, url(2000), Limits())


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < SAFE_PILLOW,
    reason="this Pillow reads the data of every entry, of which the server warns at its start",
)
def test_exif_data_do_not_multiply() -> None:
    """Many entries of a directory name the same megabyte."""
    entries, size = 400, 1 << 20
    start = 8 + 2 + 12 * entries + 4
    exif = struct.pack("<4sIH", b"II*\0", 8, entries)
    exif += b"".join(struct.pack("<HHII", 1000 + i, 7, size, start) for i in range(entries))
    url = png(1, eXIf=exif + bytes(4 + size))
    tracemalloc.start()
    try:
        assert load_image(url, Limits()).size == (1, 1)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


# -- which frames ---------------------------------------------------------------------------------


def test_sampled_frames_are_those_of_a_whole_decode() -> None:
    import av

    moving, animated = clip(64, 21), gif(64, 21)
    with av.open(io.BytesIO(content(moving))) as opened:
        decoded = [f.to_ndarray(format="rgb24") for f in opened.decode(video=0)]
    shown = ImageSequence.Iterator(Image.open(io.BytesIO(content(animated))))
    every = {moving: decoded, animated: [np.asarray(p.convert("RGB")) for p in shown]}
    for url, whole in every.items():
        expected = np.stack([whole[i] for i in frame_indices(21, 8)])
        assert np.array_equal(load_video(url, Limits(frames=8))[0], expected)


@pytest.fixture(scope="module")
def still(tmp_path_factory: Any) -> Path:
    """A still picture of ten seconds, in which a block shows for half a second."""
    shown = np.repeat(pictures(1), 240, 0)
    shown[101:113, 20:44, 30:60] = 250
    return write_clip(tmp_path_factory.mktemp("clip"), "h264", shown)


@pytest.mark.parametrize("policy", [5, "1fps", "stream:6"])
def test_a_request_gets_the_frames_of_python(still: Path, policy: Any) -> None:
    expected = load_media(still, policy)
    url = data(still.read_bytes(), "video/mp4")
    prompt = read(user(part(url), media_io_kwargs={"video": {"frames": policy}}))
    assert prompt.samplings == [expected.sampling]
    assert np.array_equal(prompt.videos[0], np.stack([np.asarray(f) for f in expected]))


def uneven(folder: Path) -> Path:
    ticks = np.cumsum(np.random.default_rng(0).choice([1, 2, 9], 60)).tolist()
    return write_clip(folder, "h264", pictures(60), times=ticks)


def headless(folder: Path) -> Path:
    """A recording that begins within a group, as one that was cut out of a stream."""
    return without(write_clip(folder, "h264-open", pictures(60)), range(3))


def half(folder: Path) -> Path:
    """A recording with two groups of which no frame can be decoded."""
    path = write_clip(folder, "hevc-open", pictures(60))
    damage(path, range(20, 60))
    return path


@pytest.mark.parametrize("policy", [20, "4fps"])
@pytest.mark.parametrize("make", [uneven, headless, half])
@pytest.mark.filterwarnings("ignore::tokencomp.errors.FrameChoiceWarning")
def test_missing_frames_repeat_as_in_python(tmp_path: Path, make: Any, policy: Any) -> None:
    """A whole decode is the oracle; the frame shown before is repeated, or the first chosen."""
    path = make(tmp_path)
    expected, left = load_media(path, policy), decodable(path)
    limits = Limits(policy=str(policy))
    shown, sampling = decode_apart(path.read_bytes(), limits, Deadline(60))
    assert sampling == expected.sampling and len(shown) == len(expected)
    assert (set(sampling.indices) <= left.keys()) == (make is uneven)
    first = min(left.keys() & set(sampling.indices))
    for picture, same, k in zip(shown, expected, sampling.indices, strict=True):
        before = max((place for place in left if place <= k), default=first)
        assert np.array_equal(picture, left[before]) and np.array_equal(picture, same)


def test_a_file_whose_decoder_reports_damage_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path, "h264", pictures(60))
    damage(path, range(24, 30))
    refused(400, decode_apart, path.read_bytes(), Limits(), Deadline(60))


def test_frames_of_a_file_that_changes_its_size_have_that_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "changing.mkv"
    path.write_bytes(photographs(64, 64, 48, 64))
    shown, sampling = decode_apart(path.read_bytes(), Limits(), Deadline(60))
    expected = load_media(path, 4)
    assert sampling == expected.sampling and shown.shape == (4, 64, 64, 3)
    assert np.array_equal(shown, np.stack([np.asarray(frame) for frame in expected]))


def test_animations_have_policies(tmp_path: Path) -> None:
    path = write_clip(tmp_path, "gif", pictures(40))
    for policy in ("2fps", "stream:4", ""):
        sampling = load_video(data(path.read_bytes(), "video/gif"), Limits(policy=policy))[1]
        expected = load_media(path, policy or 32).sampling
        assert sampling.indices == expected.indices and sampling.rule == expected.rule


@pytest.mark.parametrize(
    ("options", "status"),
    [({"video": {"frames": "stream:33"}}, 413), ({"video": {"frames": 64}}, 413),
     ({"video": {"frames": "best"}}, 400), ({"video": {"frames": "scorer:aks:8"}}, 400),
     ({"video": {"frames": "-1fps"}}, 400), ({"video": {"num_frames": 4}}, 400),
     ({"video": {"frames": 4, "fps": 1}}, 400), ({"image": {}}, 400), ([1], 400)],
)  # fmt: skip
def test_other_choices_of_frames_are_refused(options: Any, status: int) -> None:
    refused(status, with_request, options, Limits())


def test_a_rate_is_bounded_by_the_number_of_frames(still: Path) -> None:
    url = data(still.read_bytes(), "video/mp4")
    for policy, status in (("4fps", 413), ("25fps", 400)):  # 40 frames; more than the clip has
        chosen = {"video": {"frames": policy}}
        refused(status, lambda c=chosen: read(user(part(url), media_io_kwargs=c)))


# -- the process that decodes a file --------------------------------------------------------------

CLIP = content(clip(84, 21))


def test_frames_and_times_are_those_of_this_process(still: Path) -> None:
    for file, limits in ((CLIP, Limits(frames=8)), (still.read_bytes(), Limits(policy="stream:6"))):
        here, sampling = decode_container(file, limits, Deadline(60))
        there, same = decode_apart(file, limits, Deadline(60))
        assert np.array_equal(here, there) and same == sampling and there.flags.writeable


def test_modules_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code injection by files in the folder where the server was started."""
    for name in ("numpy", "tokencomp", "av"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert len(decode_apart(CLIP, Limits(), Deadline(60))[0]) == 21


def test_refusals_keep_their_status_and_words() -> None:
    for file, limits, status in ((CLIP, Limits(max_decoded=20), 413), (CLIP[:300], Limits(), 400)):
        words = [
            refused(status, d, file, limits, Deadline(60)) for d in (decode_container, decode_apart)
        ]
        assert words[0] == words[1]


def test_frames_that_do_not_fit_into_memory_are_refused() -> None:
    refused(413, decode_apart, CLIP, Limits(decode_memory=1 << 20), Deadline(60))


def test_a_process_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that the system has ended, before or after it has read the file."""
    for command in ("/bin/true", "/bin/cat"):
        monkeypatch.setattr(video.sys, "executable", command)
        refused(413, decode_apart, bytes(10**6), Limits(), Deadline(60))


def test_the_process_ends_when_the_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that leave a long video to the server, again and again."""
    script = tmp_path / "endless"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(video.sys, "executable", str(script))
    deadline = Deadline(60)
    leaving = threading.Timer(0.5, deadline.cancel)
    leaving.start()
    for _ in range(2):  # the second time, it has left already
        refused(413, decode_apart, CLIP, Limits(), deadline)
    leaving.join()
