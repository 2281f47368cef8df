"""A few bytes can decode to very many pixels, so pixels are counted before they are decoded."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest

pytest.importorskip("pydantic")

from PIL import Image
from support.serving import models as tiny

from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.media import Limits, load_image, load_video
from tokencomp.serving.hf.schema import parse
from tokencomp.serving.spec import ServerOptions

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


def request(*urls: str) -> dict[str, Any]:
    parts = []
    for url in urls:
        kind = "image_url" if url.startswith("data:image/png") else "video_url"
        parts.append({"type": kind, kind: {"url": url}})
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("make", [frames, clip, gif])
def test_all_frames_of_a_video_count(make: Any) -> None:
    limits = Limits(max_pixels=40_000, max_total_pixels=100_000, frames=8)
    assert load_video(make(96, 8), limits).shape == (8, 96, 96, 3)
    assert len(load_video(make(128, 6), limits)) == 6
    with pytest.raises(RequestError, match="Send fewer or smaller") as error:
        load_video(make(128, 8), limits)
    assert error.value.status == 413


def test_a_single_image_has_its_own_limit() -> None:
    assert load_image(image(200), LIMITS).size == (200, 200)
    with pytest.raises(RequestError, match="40000"):
        load_image(image(201), LIMITS)


def test_all_media_of_a_request_count_together() -> None:
    options = ServerOptions.parse({"ratio": 0.5}, "hf")
    prompt = parse(request(image(200), frames(100, 4), image(100)), options, LIMITS)
    assert prompt.pixels == 200 * 200 + 4 * 100 * 100 + 100 * 100
    for urls in ([image(200)] * 3, [image(200), frames(100, 7)], [frames(100, 7), image(200)]):
        with pytest.raises(RequestError, match="left"):
            parse(request(*urls), options, LIMITS)
