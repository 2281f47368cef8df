"""Video files are decoded in a process of their own, whose end is only a refused request."""

from __future__ import annotations

import base64
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("av")

from support.serving import http

from tokencomp.serving import video
from tokencomp.serving.limits import Deadline, Limits, RequestError
from tokencomp.serving.video import decode_apart, decode_container


def clip() -> bytes:
    return base64.b64decode(http.mp4_url(1, frames=21).partition(",")[2])


def box(kind: str, *parts: bytes) -> bytes:
    """Return a box of an MP4 file."""
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind.encode() + content


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def promising(samples: int) -> bytes:
    """Return an MP4 file of 700 bytes whose tables say that it has so many samples of one byte."""
    matrix = numbers(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    sample = box(
        "mp4v", bytes(6), b"\0\1", bytes(16), struct.pack(">HH", 64, 64), bytes(14), bytes(32),
        struct.pack(">Hh", 24, -1),
    )  # fmt: skip
    tables = [
        box("stsd", numbers(0, 1), sample), box("stts", numbers(0, 1, samples, 1)),
        box("stsc", numbers(0, 1, 1, samples, 1)), box("stsz", numbers(0, 1, samples)),
        box("stco", numbers(0, 1, 8)),
    ]  # fmt: skip
    media = box(
        "mdia", box("mdhd", numbers(0, 0, 0, 1000, 1000), bytes(4)),
        box("hdlr", numbers(0, 0), b"vide", bytes(14)),
        box("minf", box("vmhd", bytes(12)), box("stbl", *tables)),
    )  # fmt: skip
    track = box("tkhd", numbers(7, 0, 0, 1, 0, 1000), bytes(16), matrix, numbers(64 << 16) * 2)
    header = box(
        "mvhd", numbers(0, 0, 0, 1000, 1000, 1 << 16), b"\1\0", bytes(10), matrix, bytes(24),
        numbers(2),
    )  # fmt: skip
    movie = box("moov", header, box("trak", track, media))
    return box("ftyp", b"isom", bytes(4), b"isom") + movie + box("mdat", bytes(100))


@pytest.mark.parametrize("frames", [8, 32])
def test_frames_and_times_are_those_of_this_process(frames: int) -> None:
    limits = Limits(frames=frames)
    here, sampling = decode_container(clip(), limits, Deadline(60))
    there, same = decode_apart(clip(), limits, Deadline(60))
    assert np.array_equal(here, there) and same == sampling and there.flags.writeable
    assert len(here) == min(frames, 21)


def test_modules_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "tokencomp", "av"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert len(decode_apart(clip(), Limits(), Deadline(60))[0]) == 21


def test_refusals_keep_their_status() -> None:
    few = Limits(max_decoded=20)
    for content, limits, status in ((clip(), few, 413), (clip()[:300], Limits(), 400)):
        errors = []
        for decode in (decode_container, decode_apart):
            with pytest.raises(RequestError) as error:
                decode(content, limits, Deadline(60))
            assert error.value.status == status
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_a_file_that_promises_many_samples_only_fails_itself() -> None:
    """Its table takes 700 MB, and ten times as many samples would take ten times as much."""
    content, errors = promising(20_000_000), []
    assert len(content) < 1000
    for memory in (256 << 20, 2 << 30):
        with pytest.raises(RequestError) as error:
            decode_apart(content, Limits(decode_memory=memory), Deadline(60))
        errors.append(str(error.value))
    # With the smaller limit the demuxer cannot make the table, so it sees no frames.
    assert "no frames" in errors[0] and "cannot be decoded (" in errors[1]


def test_frames_that_do_not_fit_into_memory_are_refused() -> None:
    with pytest.raises(RequestError, match="1 MiB of memory") as error:
        decode_apart(clip(), Limits(decode_memory=1 << 20), Deadline(60))
    assert error.value.status == 413


def test_a_process_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that the system has ended, before or after it has read the file."""
    for command in ("/bin/true", "/bin/cat"):
        monkeypatch.setattr(video.sys, "executable", command)
        with pytest.raises(RequestError, match="of memory"):
            decode_apart(bytes(10**6), Limits(), Deadline(60))


def test_the_process_ends_when_the_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "endless"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(video.sys, "executable", str(script))
    deadline = Deadline(60)
    leaving = threading.Timer(0.5, deadline.cancel)
    leaving.start()
    with pytest.raises(RequestError, match="not decoded within"):
        decode_apart(clip(), Limits(), deadline)
    leaving.join()
    with pytest.raises(RequestError, match="not decoded within"):  # it has left already
        decode_apart(clip(), Limits(), deadline)
