"""Chosen frames are those of a whole decode, for every codec, and few others are decoded."""

from __future__ import annotations

import math
import struct
import warnings

import numpy as np
import pytest
from support.clips import CODECS, damage, decodable, pictures, write_clip

from tokencomp.errors import FrameChoiceWarning
from tokencomp.inputs.media import load_media
from tokencomp.inputs.video.container import VideoFile

av = pytest.importorskip("av")
COUNT = 60
CHOICES = ([3, 22, 40, 59], [0], [19, 20, 21], [37, 41, 55])
SHORT_GROUPS = {"g": "16"}
OWN_GROUPS = ("h264-open", "h264-refresh", "hevc", "hevc-open", "av1", "mjpeg", "gif")


def whole(path):
    """Every frame and when it is shown, decoded from the start."""
    with av.open(str(path)) as container:
        shown = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return [time for time, _ in shown], [picture for _, picture in shown]


def costs(path, choice):
    """Frames from the key frame before each chosen frame up to it, in plain loops."""
    with av.open(str(path)) as container:
        listed = [(p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]
    shown = sorted(pts for pts, _ in listed)
    last_of = {}
    for place in choice:
        keys = [pts for pts, key in listed if key and pts <= shown[place]]
        last_of.setdefault(max(keys), []).append(shown[place])
    numbers = [pts for pts, _ in listed]
    return sum(max(map(numbers.index, wanted)) - numbers.index(key) + 1
               for key, wanted in last_of.items())  # fmt: skip


@pytest.fixture(scope="module", params=CODECS)
def clip(request, tmp_path_factory):
    more = {} if request.param in OWN_GROUPS else SHORT_GROUPS
    folder = tmp_path_factory.mktemp("clips")
    return request.param, write_clip(folder, request.param, pictures(COUNT), **more)


@pytest.mark.parametrize("threads", [1, 3])
def test_chosen_frames_are_those_of_a_whole_decode(clip, threads):
    name, path = clip
    _, every = whole(path)
    with VideoFile(lambda: av.open(str(path)), threads) as file:
        assert file.index.total == len(every) == COUNT
        for choice in CHOICES:
            before = file.decoded
            got = {place: f.to_ndarray(format="rgb24") for place, f in file.frames(choice)}
            assert sorted(got) == choice
            assert all(np.array_equal(got[place], every[place]) for place in choice)
            # A key frame that is spread over several frames needs those before it as well.
            once_more = 2 * COUNT if name == "h264-refresh" else 0
            assert file.decoded - before <= costs(path, choice) + once_more


@pytest.mark.parametrize("bframes", ["0", "3"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_trimmed_file_shows_its_first_frames(tmp_path, bframes, suffix):
    """Trimming without encoding hides the key frame, and frames before the cut, by an edit list."""
    long = write_clip(tmp_path, "h264", pictures(COUNT), g="16", bf=bframes)
    path, cut = tmp_path / f"trimmed{suffix}", 22
    with av.open(str(long)) as old, av.open(str(path), "w") as new:
        stream, source = new.add_stream_from_template(old.streams.video[0]), old.streams.video[0]
        start = round(cut / 24 / source.time_base)
        old.seek(start, stream=source)
        for packet in (p for p in old.demux(source) if p.size):
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = stream
            new.mux(packet)
    _, every = whole(path)
    assert len(every) == COUNT - cut
    video, said = warned_of(path, len(every))
    assert said == [] and all(np.array_equal(a, b) for a, b in zip(video, every, strict=True))
    assert np.array_equal(load_media(path, 19)[1], every[3])  # one frame needs the hidden key frame


@pytest.mark.parametrize("segments", [[(25, 60)], [(5, 25), (25, 60)]])
def test_a_list_of_edits_is_no_damage(tmp_path, segments):
    """An edit list that leaves out parts: the header counts their frames as well."""
    long = write_clip(tmp_path, "h264", pictures(COUNT), g="16", bf="0")
    long.write_bytes(edited(long.read_bytes(), segments))
    _, every = whole(long)
    assert len(every) == sum(stop - start for start, stop in segments)
    video, said = warned_of(long, len(every))
    assert said == [] and all(np.array_equal(a, b) for a, b in zip(video, every, strict=True))


def edited(content, segments, rate=24):
    """An MP4 whose edit list shows these ranges of frames."""
    boxes, start = [], 0
    for name in (b"moov", b"trak", b"edts", b"elst"):
        start = content.index(name, start) - 4
        boxes.append(start)
    field = struct.Struct(">I")
    (scale,) = field.unpack_from(content, content.index(b"mvhd") + 16)
    (ticks,) = field.unpack_from(content, content.index(b"mdhd") + 16)
    rows = [
        struct.pack(">Iii", (stop - first) * scale // rate, first * ticks // rate, 1 << 16)
        for first, stop in segments
    ]
    (length,) = field.unpack_from(content, start)
    listed = struct.pack(">I4sII", 16 + 12 * len(rows), b"elst", 0, len(rows)) + b"".join(rows)
    result = bytearray(content)
    result[start : start + length] = listed
    for box in boxes[:-1]:
        (old,) = field.unpack_from(content, box)
        field.pack_into(result, box, old + len(listed) - length)
    return bytes(result)


def test_an_avi_of_b_frames_is_in_the_order_of_a_decode(tmp_path, monkeypatch):
    """FFmpeg gives its packets ascending times, although frames are decoded in another order."""
    monkeypatch.setitem(CODECS, "h264-avi", ("libx264", ".avi", {"bf": "3"}))
    path = write_clip(tmp_path, "h264-avi", pictures(COUNT))
    _, every = whole(path)
    video = load_media(path, 20)
    assert video.sampling.indices == tuple(range(1, COUNT, 3))
    assert video.sampling.seconds == pytest.approx([k / 24 for k in range(1, COUNT, 3)], abs=0.1)
    assert all(np.array_equal(p, every[k]) for p, k in zip(video, range(1, COUNT, 3), strict=True))


def test_layers_in_time_stay_exact(tmp_path):
    """In HEVC with layers, frames that are left out must not be those that others need."""
    options = {"x265-params": "log-level=none:temporal-layers=3:keyint=40"}
    path = write_clip(tmp_path, "hevc", pictures(COUNT), **options)
    _, every = whole(path)
    with VideoFile(lambda: av.open(str(path))) as file:
        for place in range(0, COUNT, 3):
            ((at, frame),) = file.frames([place])
            assert at == place and np.array_equal(frame.to_ndarray(format="rgb24"), every[place])


def test_frames_of_variable_rate_have_their_own_times(tmp_path):
    ticks = np.cumsum(np.random.default_rng(0).choice([1, 2, 9], 40)).tolist()
    path = write_clip(tmp_path, "h264", pictures(40), times=ticks)
    times, every = whole(path)
    video = load_media(path, 6)
    sampling = video.sampling
    at = [time - times[0] for time in times]
    assert sampling.times == pytest.approx([at[k] for k in sampling.indices])
    said = sampling.metadata()
    stamps = [k / said["fps"] for k in said["frames_indices"]]
    assert stamps == pytest.approx(sampling.times)
    assert said["total_num_frames"] / said["fps"] == pytest.approx(at[-1], rel=0.05)
    shown = load_media(path, "2fps")
    middles = [0.25 + k / 2 for k in range(round(2 * at[-1] * 40 / 39))]
    plain = sorted({max(k for k, time in enumerate(at) if time <= m + 1e-9) for m in middles})
    assert [*shown.sampling.indices] == plain
    assert all(np.array_equal(p, every[k]) for p, k in zip(shown, plain, strict=True))


def test_a_header_that_lies_about_the_rate(tmp_path):
    """Qwen3-VL would write wrong times; the packets say when frames are shown."""
    path = write_clip(tmp_path, "vp9", pictures(30), times=[3 * k for k in range(30)])
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 24  # DefaultDuration of the header
    sampling = load_media(path, 4).sampling
    assert sampling.fps == pytest.approx(8) and sampling.times is None


@pytest.mark.parametrize("size", [96, 48])
def test_frames_are_scaled_while_they_are_converted(tmp_path, size):
    path = write_clip(tmp_path, "h264", pictures(COUNT, 192, 128))
    full, small = load_media(path, 4), load_media(path, 4, size=size)
    assert small.sampling == full.sampling
    for one, other in zip(full, small, strict=True):
        assert other.size == (size, round(size * 2 / 3))
        wanted = np.asarray(one.resize(other.size, 3), float)  # Pillow's bicubic filter
        error = ((np.asarray(other, float) - wanted) ** 2).mean()
        assert 10 * math.log10(255**2 / error) > 30
    same = load_media(path, 4, size=192)
    assert all(np.array_equal(a, b) for a, b in zip(full, same, strict=True))


@pytest.mark.parametrize("name", ["h264", "hevc", "vp9"])
def test_damaged_frames_repeat_the_one_shown_before(tmp_path, name):
    """All 20 chosen frames come, at their own times; the warning counts those that repeat."""
    more = {} if name in OWN_GROUPS else SHORT_GROUPS
    if name == "hevc":
        more = {"x265-params": "log-level=none:keyint=16"}
    path = write_clip(tmp_path, name, pictures(COUNT), **more)
    damage(path, range(2 * COUNT // 5, 2 * COUNT // 5 + 6))
    left = decodable(path)
    with pytest.warns(FrameChoiceWarning, match="are repeated") as warned:
        video = load_media(path, 20)
    at = video.sampling.indices
    assert len(video) == 20 and at == tuple(range(1, COUNT, 3))
    lost = [k for k in at if k not in left]
    assert f"{len(lost)} of 20 chosen frames" in str(warned[0].message) and lost
    for picture, k in zip(video, at, strict=True):
        shown = max(place for place in left if place <= k)
        assert np.array_equal(picture, left[shown])


def muxed(path, out, keep=lambda k: True, **options):
    """The packets of a file in another container, in decoding order, those of `keep`."""
    with av.open(str(path)) as old, av.open(str(out), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for k, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if keep(k):
                packet.stream = stream
                new.mux(packet)
    return out


def warned_of(path, frames=8):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        video = load_media(path, frames)
    return video, [str(one.message) for one in warned]


@pytest.mark.parametrize(("name", "container"), [("h264", "mp4"), ("h264", "mkv"), ("vp9", "webm")])
def test_a_file_that_was_cut_off_says_so(tmp_path, name, container):
    """By the count in the header, or by its duration."""
    whole = write_clip(tmp_path, name, pictures(COUNT), **SHORT_GROUPS)
    flags = {"movflags": "faststart"} if container == "mp4" else {}
    path = muxed(whole, tmp_path / f"cut.{container}", **flags)
    assert warned_of(path)[1] == []
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])
    video, said = warned_of(path)
    total = video.sampling.total
    assert len(video) == 8 and 10 < total < COUNT
    assert f"{COUNT - total} of {COUNT} frames are missing" in said[-1]


@pytest.mark.parametrize("container", ["mkv", "ts"])
def test_a_hole_says_so(tmp_path, container):
    """Groups of 16 frames, of which one is lost; Matroska and MPEG-TS do not count frames."""
    whole = write_clip(tmp_path, "h264", pictures(COUNT), **SHORT_GROUPS)
    path = muxed(whole, tmp_path / f"hole.{container}", lambda k: not 16 <= k < 32)
    video, said = warned_of(path)
    assert video.sampling.total == COUNT - 16
    assert f"16 of {COUNT} frames are missing" in said[0]


def test_pauses_of_a_variable_rate_are_no_holes(tmp_path):
    ticks = np.cumsum(np.random.default_rng(0).choice([1, 2, 9], 40)).tolist()
    path = write_clip(tmp_path, "h264", pictures(40), times=ticks)
    assert warned_of(muxed(path, tmp_path / "varied.mkv"))[1] == []


def test_empty_frames_of_an_avi_are_not_missing(tmp_path):
    """Its header counts ticks of the clock, of which most hold no frame."""
    path = write_clip(tmp_path, "mpeg4", pictures(COUNT))
    path = muxed(path, tmp_path / "plain.avi")
    assert warned_of(path)[1] == []
