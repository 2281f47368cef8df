"""Both engines take the same frames of a video file: vLLM's own media connector loads them."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed")
pytest.importorskip("av")

from PIL import Image
from support.serving.doors import REACHED, Vllm, ask, part, user, vllm
from support.serving.files import canvas, data, encoded, frames, still

from tokencomp.serving.bind import Bind
from tokencomp.serving.launch import vllm_command
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.video import load_video, with_request
from tokencomp.serving.vllm import register

PROCESSORS = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "Glm4vVideoProcessor", None)


def numbered(total: int, rate: Fraction, *more: str) -> str:
    """Return a video file whose frames show their number as two shades of grey."""

    def frame(number: int) -> np.ndarray:
        shown = np.full((48, 64, 3), number % 25 * 10, np.uint8)
        shown[:, 32:] = number // 25 * 10
        return shown

    return encoded(map(frame, range(total)), rate, *more)


def numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers of frames from their pixels."""
    low, high = frames[:, 12:36, 8:24].mean((1, 2, 3)), frames[:, 12:36, 40:56].mean((1, 2, 3))
    return (np.rint(high / 10) * 25 + np.rint(low / 10)).astype(int).tolist()


@pytest.fixture(scope="module")
def connector(tiny_folder: Any) -> Any:
    """vLLM's connector with the arguments that `tokencomp serve --engine vllm` passes to it."""
    from vllm.multimodal.media.connector import MediaConnector

    register()
    command, _ = vllm_command(str(tiny_folder("qwen2_vl")), {"ratio": 0.5}, Bind(), Limits(), [])
    value = command[command.index("--media-io-kwargs") + 1]
    return MediaConnector(media_io_kwargs=json.loads(value))


@pytest.mark.parametrize("rate", [Fraction(4), Fraction(24000, 1001), Fraction(7)])
@pytest.mark.parametrize("total", [1, 8, 100, 600])
def test_frames_depend_on_the_file_alone(connector: Any, total: int, rate: Fraction) -> None:
    url = numbered(total, rate)
    middles = [(2 * k + 1) * total // 64 for k in range(32)] if total > 32 else [*range(total)]
    ours, sampling = load_video(url, Limits())
    assert numbers(ours) == [*sampling.indices] == middles
    for processor in PROCESSORS:
        shown, metadata = connector.fetch_video(url, video_processor=processor).media
        assert np.array_equal(shown, ours)
        assert metadata["frames_indices"] == middles and not metadata["do_sample_frames"]
        assert metadata["fps"] == sampling.fps and metadata["total_num_frames"] == total


@pytest.mark.parametrize("policy", [5, "1fps", "stream:6"])
def test_policies_of_requests(connector: Any, policy: Any) -> None:
    from vllm.multimodal.media.connector import MediaConnector, merge_media_io_kwargs

    url = numbered(100, Fraction(4))
    asked = merge_media_io_kwargs(connector.media_io_kwargs, {"video": {"frames": policy}})
    ours, sampling = load_video(url, with_request({"video": {"frames": policy}}, Limits()))
    theirs, metadata = MediaConnector(media_io_kwargs=asked).fetch_video(url).media
    assert np.array_equal(theirs, ours) and len(ours) == {5: 5, "1fps": 25}.get(policy, 6)
    assert metadata["frames_indices"] == [*sampling.indices]


def test_other_containers_animations_and_lists(connector: Any) -> None:
    pictures = [Image.new("L", (64, 48), shade) for shade in range(0, 250, 5)]
    files = {numbered(50, Fraction(5), "webm", "libvpx"): 32, frames(64, 5): 5}
    for name in ("gif", "webp"):
        out = io.BytesIO()
        pictures[0].save(out, name, save_all=True, append_images=pictures[1:], duration=100)
        files[data(out.getvalue(), f"video/{name}")] = 32
    for url, count in files.items():
        ours, sampling = load_video(url, Limits())
        shown, metadata = connector.fetch_video(url, video_processor=PROCESSORS[1]).media
        assert np.array_equal(shown, ours) and len(shown) == count
        assert metadata["frames_indices"] == [*sampling.indices]
        assert metadata["fps"] == sampling.fps and not metadata["do_sample_frames"]


def taken(connector: Any, url: str, count: int, **chosen: Any) -> list[np.ndarray]:
    """Return the frames of a request for `count` times a video, as the engine would load them."""
    from vllm.multimodal.media.connector import MediaConnector, merge_media_io_kwargs

    app, body = Vllm(), user(*[part(url)] * count)
    if chosen:
        body["media_io_kwargs"] = {"video": chosen}
    assert ask(vllm(app=app), body).status == REACHED
    asked = json.loads(app.seen[0])["media_io_kwargs"]
    loader = MediaConnector(media_io_kwargs=merge_media_io_kwargs(connector.media_io_kwargs, asked))
    return [loader.fetch_video(url).media[0] for _ in range(count)]


@pytest.mark.parametrize("make", [canvas, still])
def test_limits_on_videos_hold(connector: Any, make: Any) -> None:
    """Four clips in 4.5 kB took 3.7 GB, as each could have the pixels of a whole request."""
    url = make(1250, 32)
    assert taken(connector, url, 1)[0].shape == (32, 1250, 1250, 3)
    with pytest.raises(RequestError) as error:
        taken(connector, url, 7)
    assert error.value.status == 413


def test_frames_that_are_not_taken_have_limits_too(connector: Any) -> None:
    url = canvas(500, 3000)  # three quarters of a gigapixel
    assert len(taken(connector, url, 1, frames=1)) == 1
    with pytest.raises(RequestError, match="3000 frames"):
        taken(connector, url, 2, frames=1)
