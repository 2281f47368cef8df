"""Requests choose the frames of a video: the same ones as in Python."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("av")

from support.clips import pictures, write_clip
from support.serving.prompts import read

from tokencomp.inputs.media import load_media
from tokencomp.serving.hf.prompt import Prompt
from tokencomp.serving.limits import Deadline, Limits, RequestError
from tokencomp.serving.video import decode_apart, load_video, with_request


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    """A still picture in which a block shows for half a second."""
    frames = np.repeat(pictures(1), 240, 0)
    frames[101:113, 20:44, 30:60] = 250
    return write_clip(tmp_path_factory.mktemp("clip"), "h264", frames)


def url(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def parsed(path: Path, **fields: Any) -> Prompt:
    part = {"type": "video_url", "video_url": {"url": url(path)}}
    return read({"messages": [{"role": "user", "content": [part]}], **fields})


@pytest.mark.parametrize("frames", [5, "1fps", "stream:6"])
def test_a_request_gets_the_frames_of_python(clip: Path, frames: Any) -> None:
    expected = load_media(clip, frames)
    prompt = parsed(clip, media_io_kwargs={"video": {"frames": frames}})
    assert prompt.samplings == [expected.sampling]
    assert np.array_equal(prompt.videos[0], np.stack([np.asarray(f) for f in expected]))


def test_policies_reach_the_process_that_decodes(clip: Path) -> None:
    frames, sampling = decode_apart(clip.read_bytes(), Limits(policy="stream:6"), Deadline(60))
    expected = load_media(clip, "stream:6")
    assert sampling == expected.sampling and sampling.rule.startswith("stream")
    assert np.array_equal(frames, np.stack([np.asarray(f) for f in expected]))


def test_animations_have_policies(tmp_path: Path) -> None:
    path = write_clip(tmp_path, "gif", pictures(40))
    for policy in ("2fps", "stream:4", ""):
        sampling = load_video(url(path), Limits(policy=policy))[1]
        expected = load_media(path, policy or 32).sampling
        assert sampling.indices == expected.indices and sampling.rule == expected.rule


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [({"video": {"frames": "stream:33"}}, 413, "33 frames; the limit is 32"),
     ({"video": {"frames": 64}}, 413, "the limit is 32"),
     ({"video": {"frames": "best"}}, 400, 'expected 8 .*or "stream:8" .by bursts.[.]$'),
     ({"video": {"frames": "scorer:aks:8"}}, 400, "nothing can score"),
     ({"video": {"frames": "-1fps"}}, 400, "frames='-1fps': expected"),
     ({"video": {"num_frames": 4}}, 400, "frames of videos alone"),
     ({"video": {"frames": 4, "fps": 1}}, 400, "frames of videos alone"),
     ({"image": {}}, 400, "frames of videos alone"), ([1], 400, "frames of videos alone")],
)  # fmt: skip
def test_other_options_are_refused(options: Any, status: int, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        with_request(options, Limits())
    assert error.value.status == status


def test_a_rate_is_bounded_by_the_limit(clip: Path) -> None:
    with pytest.raises(RequestError, match="40 frames; the limit is 32") as error:
        parsed(clip, media_io_kwargs={"video": {"frames": "4fps"}})
    assert error.value.status == 413
    with pytest.raises(RequestError, match="24 frames per second"):
        parsed(clip, media_io_kwargs={"video": {"frames": "25fps"}})
    assert with_request(None, Limits()) == with_request({}, Limits()) == Limits()
