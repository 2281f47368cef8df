"""Videos of requests: chosen frames within limits on frames, pixels, time and memory.

The first bytes of a file decide which demuxer opens it, and only demuxers that cannot refer to
other files are used.

A demuxer makes tables as long as a file says, and a few hundred bytes can say gigabytes. Neither
limits on what is decoded nor exceptions help there: the server itself would be killed. So each
video file is decoded in a process with limited memory, which runs `main`. The server sends it a
line of JSON with the limits, and the file; the answer is a line of JSON with an error, or with
shape and times of the frames, and then the frames as bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from tokencomp.errors import MediaError, OptionError
from tokencomp.inputs.media import load_clip
from tokencomp.inputs.video import Sampling
from tokencomp.inputs.video.clips import AnimationClip, Clip, FileClip
from tokencomp.inputs.video.container import VideoFile
from tokencomp.inputs.video.frames import Choice, Scored, frame_policy
from tokencomp.inputs.video.packets import ClipIndex
from tokencomp.serving.limits import Deadline, Limits, RequestError, TimedReader
from tokencomp.serving.media import (
    FRAME_LIST,
    check_size,
    count_frames,
    decode_image,
    frame_list,
    read_url,
)

Decoded = tuple[np.ndarray, Sampling]
"""Frames, uint8 (frames, height, width, 3), and when they were shown."""

Decode = Callable[[bytes, Limits, Deadline], Decoded]

FIELD = "media_io_kwargs"
POLICIES = '8 (evenly spaced), "1fps" (by time) or "stream:8" (by bursts)'
FORM = '{"video": {"frames": "stream:8"}}'
FRAME_LIST_RATE = 1.0  # frames per second of a list of frames, as in vLLM
CONTAINERS = {b"\x1aE\xdf\xa3": "matroska", b"RIFF": "avi", b"OggS": "ogg"}
GRACE = 5  # seconds after the deadline when the kernel ends a process that hangs
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",  # both reserve memory per core
    "PYTHONSAFEPATH": "1",
}  # fmt: skip


# -- which frames ----------------------------------------------------------------------------------


def with_request(options: Any, limits: Limits) -> Limits:
    """Limits with the frame policy of a request, whose field `media_io_kwargs` is `options`."""
    if not options:
        return limits
    video = options.get("video") if isinstance(options, dict) and len(options) == 1 else None
    if not isinstance(video, dict) or list(video) != ["frames"]:
        raise RequestError(f"{FIELD} is open to requests for the frames of videos alone: {FORM}.")
    given = video["frames"]
    try:
        policy = frame_policy(given)
    except OptionError:
        raise RequestError(f"{FIELD}: frames={given!r}: expected {POLICIES}.") from None
    if isinstance(policy, Scored):
        raise RequestError(
            f'{FIELD}: frames="{policy}": servers decode a video before the model sees it, so '
            f"nothing can score its frames. Use {POLICIES}."
        )
    # "1fps" has no count: its frames are counted when the clip is known.
    count = getattr(policy, "count", 1)
    if count > limits.frames:
        raise RequestError(f"{FIELD}: {count} frames; the limit is {limits.frames}.", 413)
    return dataclasses.replace(limits, policy=str(policy))


def _check_video(total: int, width: int, height: int, limits: Limits, pixels: int) -> None:
    """Refuse a video of `total` frames of this size and more than `pixels` in all of them."""
    if total > limits.max_decoded:
        raise RequestError(f"more than {limits.max_decoded} frames.", 413)
    # Only the chosen frames are in memory at one time.
    check_size(width, height, limits, min(total, limits.frames))
    if total * width * height > pixels:
        raise RequestError(
            f"{total} frames of {width}×{height} pixels; all frames of a video may have "
            f"{pixels} pixels. Send a shorter or smaller video.",
            413,
        )


@dataclasses.dataclass(frozen=True)
class _Bounded:
    """The policy of some limits, which takes no more frames than these allow."""

    limits: Limits

    def choose(self, index: ClipIndex, decode: Any, question: str) -> Choice:
        policy = frame_policy(self.limits.policy or self.limits.frames)
        choice = policy.choose(index, decode, question)
        if len(choice.places) > self.limits.frames:
            raise RequestError(
                f"{len(choice.places)} frames; the limit is {self.limits.frames}.", 413
            )
        return choice

    def __str__(self) -> str:
        return self.limits.policy or str(self.limits.frames)


# -- decoding --------------------------------------------------------------------------------------


def load_video(
    url: str, limits: Limits, deadline: Deadline | None = None, decode: Decode | None = None
) -> Decoded:
    """Load the chosen frames of a video, and when they were shown.

    The format is MP4, MOV, MKV, WebM, AVI, OGG or an animated GIF or WebP. As in vLLM,
    `data:video/jpeg;base64,A,B,C` is a list of JPEG (or PNG) frames that the client has sampled
    at one frame per second. `decode` decodes files; servers use `decode_apart`.
    """
    deadline = deadline or Deadline(limits.decode_seconds)
    media_type, content = read_url(url, limits)
    if media_type == FRAME_LIST:
        parts = frame_list(content, limits)
        count = len(parts)
        images = (np.asarray(decode_image(p, limits, deadline, count)) for p in parts)
        frames = _stacked(range(count), enumerate(images))
        return _whole([*frames.values()]), Sampling((*frames,), count, FRAME_LIST_RATE)
    return load_file(content, limits, deadline, decode or decode_container)


def load_file(content: bytes, limits: Limits, deadline: Deadline, decode: Decode) -> Decoded:
    """Decode the chosen frames of an animation, or with `decode` those of a video file."""
    if content[:4] == b"GIF8" or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return _decoded("an animation", _Animation, content, limits, deadline)
    return decode(content, limits, deadline)


def decode_container(content: bytes, limits: Limits, deadline: Deadline) -> Decoded:
    """Decode the chosen frames of a video file in this process."""
    return _decoded("a video", _File, content, limits, deadline)


def _decoded(
    what: str, kind: type[Clip], content: bytes, limits: Limits, deadline: Deadline
) -> Decoded:
    """Decode the frames that the policy of some limits chooses from a clip within them."""
    try:
        with kind(content, limits, deadline) as clip:  # type: ignore[call-arg]  # of both kinds
            # Answers have no place for warnings.
            video = load_clip(clip, what, _Bounded(limits), warn=lambda text: None)
        return _whole(video), video.sampling
    except RequestError:
        raise
    except MediaError as error:
        raise RequestError(f"{what}: {error}") from None
    except ImportError:
        raise RequestError("this server has no video decoder (pip install av).", 501) from None
    except (MemoryError, BlockingIOError):  # no memory for a buffer, or for a thread of the decoder
        raise _too_much_memory(limits) from None
    except Image.DecompressionBombError:
        raise RequestError(f"a frame has more than {limits.max_pixels} pixels.", 413) from None
    except Exception as error:  # decoders raise undocumented types
        raise RequestError(f"{what} cannot be decoded ({type(error).__name__}).") from None


def _stacked(
    places: Sequence[int], arrays: Iterable[tuple[int, np.ndarray]]
) -> dict[int, np.ndarray]:
    """Parts of one array, ascending, so that no second copy of all frames exists.

    `arrays` are frames, uint8 (height, width, 3), with their places; missing ones are left out.
    """
    # One array for all frames: a second copy would double the peak of a request.
    rows = {place: row for row, place in enumerate(sorted(set(places)))}
    found: dict[int, np.ndarray] = {}
    for place, array in arrays:
        if not found:
            frames = np.empty((len(rows), *array.shape), np.uint8)
        if array.shape != frames.shape[1:]:
            raise RequestError("frames of one video differ in size.")
        frames[rows[place]] = array
        found[place] = frames[rows[place]]
    return found


def _whole(frames: Sequence[np.ndarray]) -> np.ndarray:
    """The array of `_stacked`; `frames` are its parts, repeated where a place is missing."""
    array = frames[0].base
    assert array is not None and len(array) == len(frames)
    for row, frame in enumerate(frames):
        if not np.may_share_memory(array[row], frame):  # a missing place
            array[row] = frame
    return array


class _Animation(AnimationClip):
    """An animated GIF or WebP within limits."""

    def __init__(self, content: bytes, limits: Limits, deadline: Deadline) -> None:
        super().__init__(Path("animation"))
        self.content, self.limits, self.deadline = content, limits, deadline

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        image = Image.open(TimedReader(self.content, self.deadline), formats=("GIF", "WEBP"))
        check_size(image.width, image.height, self.limits)
        yield image

    def _total(self, image: Image.Image) -> int:
        limits = self.limits
        total = count_frames(self.content, limits.max_decoded)
        if total <= limits.max_decoded:  # else Pillow would count all of them, to the last
            total = super()._total(image)
        _check_video(total, image.width, image.height, limits, limits.max_animated_pixels)
        return total

    def _seek(self, image: Image.Image, place: int) -> None:
        self.deadline.check()  # a seek over many frames at once could not be interrupted
        super()._seek(image, place)

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Any]:
        return _stacked(places, ((k, np.asarray(p)) for k, p in self._pictures(places)))


class _File(FileClip):
    """A video file within limits, opened by the demuxer that its first bytes name."""

    def __init__(self, content: bytes, limits: Limits, deadline: Deadline) -> None:
        self.path, self._decoder, self.device = Path("video"), "pyav", ""
        self.content, self.limits, self.deadline = content, limits, deadline
        self.packets, self.pixels, self.count = 0, 0, 1
        self.format = "mov" if content[4:8] == b"ftyp" else CONTAINERS.get(content[:4])
        if self.format is None:
            raise RequestError(
                "unknown video container; send MP4, MOV, MKV, WebM, AVI, OGG or GIF."
            )
        # A frame may be larger than the header says. The decoder refuses it before it makes one. As
        # it counts rows as up to 63 pixels wider than they are, the exact limit is checked later.
        options = {"max_pixels": str(2 * limits.max_pixels)}
        self.file = VideoFile(self._open, 1, self._watch, options, strict=True)

    def _readable(self) -> Any:
        return contextlib.nullcontext()  # `_decoded` has the errors of both kinds

    @cached_property
    def index(self) -> ClipIndex:
        index, limits = self.file.index, self.limits
        size = self.file.width, self.file.height
        _check_video(index.total, *size, limits, limits.max_decoded_pixels)
        return index

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Any]:
        self.count = len(set(places))
        return _stacked(places, self._arrays(places, size))

    def _open(self) -> Any:
        import av

        return av.open(TimedReader(self.content, self.deadline), "r", format=self.format)

    def _watch(self, frame: Any = None) -> None:
        """Stop at a limit: called for every packet, and with every decoded frame.

        Headers lie about the number of frames and their size, so each one is counted and checked.
        """
        self.deadline.check()
        if frame is None:
            # Packets before the first frame: a file can have millions that decode to nothing.
            self.packets += self.pixels == 0
            if self.packets > self.limits.max_decoded + 1:  # the last packet is empty
                _check_video(self.packets, 0, 0, self.limits, 0)
            return
        check_size(frame.width, frame.height, self.limits, self.count)
        self.pixels += frame.width * frame.height
        if self.pixels > self.limits.max_decoded_pixels:
            raise RequestError("more pixels than the file promises.", 413)


# -- the process that decodes a file ---------------------------------------------------------------


def decode_apart(content: bytes, limits: Limits, deadline: Deadline) -> Decoded:
    """Decode a video file as `decode_container` does, in a new process with limited memory."""
    # The process gets bytes and limits, and opens no files.
    order = {**dataclasses.asdict(limits), "allowed_path": None}
    order["decode_seconds"] = deadline.remaining()
    with _process(deadline) as process:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # if the process has ended
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.write(content)
        clip = _answer(process.stdout)
    if clip is None:
        deadline.check()
        raise _too_much_memory(limits)
    return clip


@contextlib.contextmanager
def _process(deadline: Deadline) -> Iterator[subprocess.Popen[bytes]]:
    """Run `main` in a process, which is killed at the end of the block or of the deadline."""
    folders = [str(Path(folder).resolve()) for folder in sys.path if folder]  # of this process
    with subprocess.Popen(
        [sys.executable, "-m", "tokencomp.serving.video"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(folders)},
        cwd=Path(sys.executable).anchor,  # modules of the working directory are not imported
        start_new_session=True,  # Ctrl-C is for the server, which lets requests end
    ) as process:
        try:
            deadline.when_cancelled(process.kill)
            yield process
        finally:
            process.kill()


def _answer(stream: IO[bytes]) -> Decoded | None:
    """Return the clip that a process sends, or None if it ended before it had sent all of it."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    head: dict[str, Any] = json.loads(line)
    if "error" in head:
        raise RequestError(head["error"], head["status"])
    frames = np.empty(head["shape"], np.uint8)
    view = memoryview(frames).cast("B")
    if stream.readinto(view) < len(view):  # type: ignore[attr-defined]  # of buffered pipes
        return None
    lists = head["sampling"].items()  # JSON has no tuples
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in lists}
    return frames, Sampling(**fields)


def _too_much_memory(limits: Limits) -> RequestError:
    return RequestError(
        f"a video cannot be decoded with {limits.decode_memory >> 20} MiB of memory. Send a "
        "shorter or smaller video.",
        413,
    )


def main() -> None:
    """Decode the video of the standard input."""
    limits = Limits(**json.loads(sys.stdin.buffer.readline()))
    content = sys.stdin.buffer.read()
    with contextlib.suppress(ImportError):
        import av  # noqa: F401  # before the limit, which is for the file
    _limit(limits)
    out = sys.stdout.buffer
    try:
        frames, sampling = decode_container(content, limits, Deadline(limits.decode_seconds))
    except RequestError as error:
        head: dict[str, Any] = {"error": str(error), "status": error.status}
        out.write(json.dumps(head).encode() + b"\n")
        return
    head = {"shape": frames.shape, "sampling": dataclasses.asdict(sampling)}
    out.write(json.dumps(head).encode() + b"\n")
    out.write(memoryview(np.ascontiguousarray(frames)).cast("B"))


def _limit(limits: Limits) -> None:
    """Limit memory and time of this process, where its system can do so (tested on Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import resource
        import signal

        signal.alarm(int(limits.decode_seconds) + GRACE)  # ends the process, whatever it does
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = limits.decode_memory
        with contextlib.suppress(OSError):  # what the process has reserved already, on Linux
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most += pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
