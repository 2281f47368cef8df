"""Videos of requests: sampled frames within limits on frames, pixels and time.

The content of a container decides which demuxer opens it, and only demuxers that cannot refer to
other files are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tokencomp.errors import MediaError
from tokencomp.inputs.container import VideoFile
from tokencomp.inputs.images import on_white, seconds_shown
from tokencomp.inputs.packets import animation_index
from tokencomp.inputs.upright import rgb
from tokencomp.inputs.video import Sampling
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.frames import chosen
from tokencomp.serving.hf.media import (
    FRAME_LIST,
    Limits,
    check_size,
    decode_base64,
    decode_image,
    read_url,
)
from tokencomp.serving.hf.structure import count_frames

Clip = tuple[np.ndarray, Sampling]
"""Frames, uint8 (frames, height, width, 3), and when they were shown."""

FRAME_LIST_RATE = 1.0  # frames per second of a list of frames, as in vLLM
CONTAINERS = {b"\x1aE\xdf\xa3": "matroska", b"RIFF": "avi", b"OggS": "ogg"}


class Frames:
    """Frames of one size in one array, which is filled without a second copy of all of them."""

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self._array: np.ndarray | None = None

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 (height, width, 3)."""
        if self._array is None:
            self._array = np.empty((self.count, *frame.shape), np.uint8)
        if frame.shape != self._array.shape[1:]:
            raise RequestError("frames of one video differ in size.")
        self._array[self.filled] = frame
        self.filled += 1

    def array(self) -> np.ndarray:
        """Return all frames as uint8 (frames, height, width, 3)."""
        if self._array is None:
            raise RequestError("a video has no frames.")
        return self._array[: self.filled]


def too_much_memory(limits: Limits) -> RequestError:
    """Return the error for a video that its process cannot hold."""
    return RequestError(
        f"a video cannot be decoded with {limits.decode_memory >> 20} MiB of memory. Send a "
        "shorter or smaller video.",
        413,
    )


def decode_container(content: bytes, limits: Limits, deadline: Deadline) -> Clip:
    """Decode the sampled frames of a video file."""
    try:
        return _Container(content, limits, deadline).frames()
    except RequestError:
        raise
    except MediaError as error:
        raise RequestError(f"a video: {error}") from None
    except ImportError:
        raise RequestError("this server has no video decoder (pip install av).", 501) from None
    except (MemoryError, BlockingIOError):  # no memory for a buffer, or for a thread of the decoder
        raise too_much_memory(limits) from None
    except Exception as error:  # decoders raise undocumented types
        raise RequestError(f"a video cannot be decoded ({type(error).__name__}).") from None


Decode = Callable[[bytes, Limits, Deadline], Clip]


def load_video(
    url: str, limits: Limits, deadline: Deadline | None = None, decode: Decode = decode_container
) -> Clip:
    """Load the frames of a video that the limits choose, and when they were shown.

    The format is MP4, MOV, MKV, WebM, AVI, OGG or an animated GIF or WebP. As in vLLM,
    `data:video/jpeg;base64,A,B,C` is a list of JPEG (or PNG) frames that the client has sampled
    at one frame per second. `decode` decodes files; servers use `decoder.decode_apart`.
    """
    deadline = deadline or Deadline(limits.decode_seconds)
    media_type, content = read_url(url, limits)
    if media_type == FRAME_LIST:
        return _frame_list(content.decode("ascii").split(","), limits, deadline)
    return load_file(content, limits, deadline, decode)


def load_file(content: bytes, limits: Limits, deadline: Deadline, decode: Decode) -> Clip:
    """Decode the sampled frames of an animation, or with `decode` those of a video file."""
    if content[:4] == b"GIF8" or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return _animation(content, limits, deadline)
    return decode(content, limits, deadline)


def _frame_list(parts: list[str], limits: Limits, deadline: Deadline) -> Clip:
    """Decode frames that were sent one by one in base64."""
    if len(parts) > limits.frames:
        raise RequestError(f"{len(parts)} frames; the limit is {limits.frames}.", 413)
    frames = Frames(len(parts))
    for part in parts:
        image = decode_image(decode_base64(part), limits, deadline, len(parts))
        frames.add(np.asarray(image))
    return frames.array(), Sampling(tuple(range(len(parts))), len(parts), FRAME_LIST_RATE)


def _check_video(total: int, width: int, height: int, limits: Limits, pixels: int) -> None:
    """Refuse a video of `total` frames of this size, before any of them is decoded.

    `pixels` is the limit on all of them.
    """
    if total > limits.max_decoded:
        raise RequestError(f"more than {limits.max_decoded} frames.", 413)
    check_size(width, height, limits, min(total, limits.frames))
    if total * width * height > pixels:
        raise RequestError(
            f"{total} frames of {width}×{height} pixels; all frames of a video may have "
            f"{pixels} pixels. Send a shorter or smaller video.",
            413,
        )


def _animation(content: bytes, limits: Limits, deadline: Deadline) -> Clip:
    """Decode the sampled frames of an animated GIF or WebP."""
    try:
        image = Image.open(deadline.reader(content), formats=("GIF", "WEBP"))
        check_size(image.width, image.height, limits)
        total = count_frames(content, limits.max_decoded)
        if total <= limits.max_decoded:  # else Pillow would count all of them, to the last
            total = getattr(image, "n_frames", 1)
        _check_video(total, image.width, image.height, limits, limits.max_animated_pixels)
        shown = []
        for place in range(total):  # a seek over many frames at once could not be interrupted
            deadline.check()
            shown.append(seconds_shown(image, place))
        index = animation_index(shown, str(image.format).lower())
        choice = chosen(index, limits)
        frames = Frames(len(choice.places))
        for place in range(choice.places[-1] + 1):
            deadline.check()
            image.seek(place)
            if place in choice.places:
                frames.add(np.asarray(on_white(image)))
        times = index.uneven_times(choice.places)
        return frames.array(), Sampling(choice.places, total, index.fps, times, choice.rule)
    except RequestError:
        raise
    except MediaError as error:
        raise RequestError(f"an animation: {error}") from None
    except Image.DecompressionBombError:
        raise RequestError(f"a frame has more than {limits.max_pixels} pixels.", 413) from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise RequestError(f"an animation cannot be read ({type(error).__name__}).") from None


class _Container:
    """A video file, opened by the demuxer that its first bytes name."""

    def __init__(self, content: bytes, limits: Limits, deadline: Deadline) -> None:
        self.content, self.limits, self.deadline = content, limits, deadline
        self.packets, self.pixels, self.count = 0, 0, 1
        self.format = "mov" if content[4:8] == b"ftyp" else CONTAINERS.get(content[:4])
        if self.format is None:
            raise RequestError(
                "unknown video container; send MP4, MOV, MKV, WebM, AVI, OGG or GIF."
            )

    def frames(self) -> Clip:
        """List the packets of the file, choose frames, and decode these."""
        # A frame may be larger than the header says. The decoder refuses it before it makes one. As
        # it counts rows as up to 63 pixels wider than they are, the exact limit is checked later.
        options = {"max_pixels": str(2 * self.limits.max_pixels)}
        with VideoFile(self._open, 1, self._watch, options, strict=True) as file:
            index = file.index
            pixels = self.limits.max_decoded_pixels
            _check_video(index.total, file.width, file.height, self.limits, pixels)
            choice = chosen(index, self.limits)
            places = choice.places
            self.count = len(places)
            frames, taken = Frames(len(places)), []
            for place, frame in file.frames(places):
                if place not in taken:
                    frames.add(rgb(frame))
                    taken.append(place)
        array, times = frames.array(), index.uneven_times(sorted(taken))
        if taken != sorted(taken):
            array = array[np.argsort(taken)]
        return array, Sampling(tuple(sorted(taken)), index.total, index.fps, times, choice.rule)

    def _open(self) -> Any:
        import av

        return av.open(self.deadline.reader(self.content), "r", format=self.format)

    def _watch(self, frame: Any = None) -> None:
        """Stop at a limit: called for every packet, and with every decoded frame.

        Headers lie about the number of frames and their size, so each one is counted and checked.
        """
        self.deadline.check()
        if frame is None:
            self.packets += self.pixels == 0
            if self.packets > self.limits.max_decoded + 1:  # the last packet is empty
                _check_video(self.packets, 0, 0, self.limits, 0)
            return
        check_size(frame.width, frame.height, self.limits, self.count)
        self.pixels += frame.width * frame.height
        if self.pixels > self.limits.max_decoded_pixels:
            raise RequestError("more pixels than the file promises.", 413)
