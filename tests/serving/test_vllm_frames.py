"""Both engines take the same frames of a video file: vLLM's own media connector loads them."""

from __future__ import annotations

import base64
import io
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed")
pytest.importorskip("av")

import av
from PIL import Image

from tokencomp.serving.bind import Bind
from tokencomp.serving.launch import vllm_command
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.video import load_video, with_request
from tokencomp.serving.vllm import register
from tokencomp.serving.vllm.request_checks import check_media, read_request
from tokencomp.serving.vllm.rules import Rules

PROCESSORS = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "Glm4vVideoProcessor", None)


def numbered(total: int, rate: Fraction, name: str = "mp4", codec: str = "mpeg4") -> str:
    """Return a video file whose frames show their number as two shades of grey."""
    out = io.BytesIO()
    with av.open(out, "w", format=name) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(total):
            frame = np.full((48, 64, 3), number % 25 * 10, np.uint8)
            frame[:, 32:] = number // 25 * 10
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return f"data:video/{name};base64," + base64.b64encode(out.getvalue()).decode()


def numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers of frames from their pixels."""
    low, high = frames[:, 12:36, 8:24].mean((1, 2, 3)), frames[:, 12:36, 40:56].mean((1, 2, 3))
    return (np.rint(high / 10) * 25 + np.rint(low / 10)).astype(int).tolist()


def still(side: int, count: int) -> str:
    """Return a video file of one colour."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(count):
            container.mux(stream.encode(av.VideoFrame(side, side, "yuv420p")))
        container.mux(stream.encode())
    return "data:video/mp4;base64," + base64.b64encode(out.getvalue()).decode()


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
        frames, metadata = connector.fetch_video(url, video_processor=processor).media
        assert np.array_equal(frames, ours)
        assert metadata["frames_indices"] == middles and not metadata["do_sample_frames"]
        assert metadata["fps"] == sampling.fps and metadata["total_num_frames"] == total


@pytest.mark.parametrize("frames", [5, "1fps", "stream:6"])
def test_policies_of_requests(connector: Any, frames: Any) -> None:
    from vllm.multimodal.media.connector import MediaConnector, merge_media_io_kwargs

    url = numbered(100, Fraction(4))
    asked = merge_media_io_kwargs(connector.media_io_kwargs, {"video": {"frames": frames}})
    ours, sampling = load_video(url, with_request({"video": {"frames": frames}}, Limits()))
    theirs, metadata = MediaConnector(media_io_kwargs=asked).fetch_video(url).media
    assert np.array_equal(theirs, ours) and len(ours) == {5: 5, "1fps": 25}.get(frames, 6)
    assert metadata["frames_indices"] == [*sampling.indices]


def test_other_containers_and_animations(connector: Any) -> None:
    pictures = [Image.new("L", (64, 48), shade) for shade in range(0, 250, 5)]
    files = [numbered(50, Fraction(5), "webm", "libvpx")]
    for name in ("gif", "webp"):
        out = io.BytesIO()
        pictures[0].save(out, name, save_all=True, append_images=pictures[1:], duration=100)
        files.append(f"data:video/{name};base64," + base64.b64encode(out.getvalue()).decode())
    for url in files:
        ours, sampling = load_video(url, Limits())
        frames, metadata = connector.fetch_video(url).media
        assert np.array_equal(frames, ours) and len(frames) == 32
        assert metadata["frames_indices"] == [*sampling.indices]


def test_lists_of_frames_have_equal_times(connector: Any) -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 48)).save(out, "JPEG")
    url = "data:video/jpeg;base64," + ",".join([base64.b64encode(out.getvalue()).decode()] * 5)
    ours, sampling = load_video(url, Limits())
    frames, metadata = connector.fetch_video(url, video_processor=PROCESSORS[1]).media
    assert np.array_equal(frames, ours) and metadata["fps"] == sampling.fps == 1
    assert metadata["frames_indices"] == [*sampling.indices] and not metadata["do_sample_frames"]


def canvas(side: int, count: int) -> str:
    """Return an animation of dots on a canvas: few bytes, very many pixels."""
    out, dots = io.BytesIO(), [Image.new("P", (1, 1), i % 2) for i in range(count)]
    dots[0].save(out, "GIF", save_all=True, append_images=dots[1:], optimize=False, duration=10)
    content = bytearray(out.getvalue())
    content[6:10] = side.to_bytes(2, "little") * 2
    return "data:video/gif;base64," + base64.b64encode(content).decode()


def taken(connector: Any, url: str, count: int, **chosen: Any) -> list[np.ndarray]:
    """Return the frames of a request for `count` times a video, as the engine would load them."""
    from vllm.multimodal.media.connector import MediaConnector, merge_media_io_kwargs

    parts = [{"type": "video_url", "video_url": {"url": url}}] * count
    body = {"messages": [{"role": "user", "content": parts}]}
    if chosen:
        body["media_io_kwargs"] = {"video": chosen}
    request = read_request(json.dumps(body).encode(), Rules(), ServerOptions())
    check_media(request, Rules())
    asked = json.loads(request.body)["media_io_kwargs"]
    loader = MediaConnector(media_io_kwargs=merge_media_io_kwargs(connector.media_io_kwargs, asked))
    return [loader.fetch_video(url).media[0] for _ in range(count)]


@pytest.mark.parametrize("make", [canvas, still])
def test_limits_on_videos_hold(connector: Any, make: Any) -> None:
    """Four clips in 4.5 kB took 3.7 GB, as each could have the pixels of a whole request."""
    url = make(1250, 32)
    assert taken(connector, url, 1)[0].shape == (32, 1250, 1250, 3)
    with pytest.raises(RequestError, match="32 × 1250×1250 pixels; 42857142 are") as error:
        taken(connector, url, 7)
    assert error.value.status == 413


def test_frames_that_are_not_taken_have_limits_too(connector: Any) -> None:
    url = canvas(500, 3000)  # three quarters of a gigapixel
    assert len(taken(connector, url, 1, frames=1)) == 1
    with pytest.raises(RequestError, match="3000 frames of 500×500"):
        taken(connector, url, 2, frames=1)
