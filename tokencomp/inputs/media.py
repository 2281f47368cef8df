"""Reading image and video files: the frames of a video are chosen before they are decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokencomp.errors import FrameChoiceWarning, MediaError, OptionError
from tokencomp.inputs.access import check_readable
from tokencomp.inputs.clock import part
from tokencomp.inputs.images import UNREADABLE, Image, load_image
from tokencomp.inputs.sounds import is_sound
from tokencomp.inputs.video import Sampling, Video
from tokencomp.inputs.video.clips import (
    AnimationClip,
    Clip,
    FileClip,
    FolderClip,
    ReaderClip,
    is_reader,
)
from tokencomp.inputs.video.frames import Frames, Policy, frame_policy

NEARLY = 0.01
"""Share of frames that headers may count too many without a word."""
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
) | {".3gp", ".ogv"}


def is_video(path: str | Path) -> bool:
    """Whether `path` is a video: by suffix, a folder of frames, or an animated picture."""
    path = Path(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return True
    try:
        if path.is_dir():
            return True
        with Image.open(path) as image:
            # An MPO is a photograph together with a preview or the view of a second lens.
            return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except UNREADABLE:  # `load_image` says what is wrong with it
        return False


def load_media(
    path: str | Path | Any,
    frames: Frames = 8,
    size: int | None = None,
    question: str = "",
    decoder: str = "pyav",
) -> Image.Image | Video:
    """Read an image, or chosen frames of a video.

    Parameters
    ----------
    path : str or Path
        An image file, a video file, an animated GIF/WebP, or a folder of frame images in the order
        of their names, where numbers count as numbers. Or a `decord.VideoReader`, whose frames are
        taken as it gives them.
    frames : int, str or policy
        Which frames of a video are decoded, see `tokencomp.inputs.video.frames`: a number of evenly
        spaced ones (a shorter video gives all the frames it has), `"1fps"`, `"stream:8"`, or a
        policy.
    size : int or None
        Longest side of a frame in pixels. Larger frames are scaled while their colours are
        converted, so that pictures of full size never exist. None leaves them as they are.
    question : str
        What will be asked; policies with a scorer may read it.
    decoder : str
        "pyav"; "decord", "torchcodec" or "torchcodec:cuda" where these are installed. All give the
        same frames, up to rounding of colours; files where they would give others are refused.

    Returns
    -------
    PIL.Image.Image or Video
        RGB. A video is a list of frames that knows which they are and when they were shown; the
        times are read from the file, and unknown for a folder of frame images.

    Raises
    ------
    MediaError
        File missing, without permission to read it, empty, corrupt, without frames, or without the
        frames that are asked for.
    OptionError
        `frames`, `size` or `decoder` is none of the above.
    ScoreError
        A scorer does not return one finite number per frame.
    MissingDependencyError
        The decoder is not installed.

    Warns
    -----
    FrameChoiceWarning
        The stream of the file says nothing, frames are damaged, or the file ends early.
    """
    policy = frame_policy(frames)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise OptionError(f"size={size!r}: give the longest side in pixels, e.g. 448, or None.")
    if decoder not in ("pyav", "decord") and decoder.partition(":")[0] != "torchcodec":
        raise OptionError(
            f"decoder={decoder!r}: use pyav, decord or torchcodec. A device may follow torchcodec "
            "alone, as in torchcodec:cuda."
        )
    if is_reader(path):
        return load_clip(ReaderClip(path), type(path).__name__, policy, size, question)
    path = Path(path)
    check_readable(path, "image or video")
    if not (path.is_file() or path.is_dir()):
        raise MediaError(f"{path}: a device or a pipe, which may have no end. Save it as a file.")
    if path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes). Download or export it again.")
    if not is_video(path):
        if is_sound(path):
            raise MediaError(f"{path}: a sound. Read it with tokencomp.inputs.sounds.load_sound.")
        with part("decode"):
            return load_image(path)
    with part("open"):
        opened = open_clip(path, decoder)
    with opened as clip:
        return load_clip(clip, str(path), policy, size, question)


def _warn(text: str) -> None:
    warnings.warn(text, FrameChoiceWarning, stacklevel=4)  # at the call of `load_media`


def load_clip(
    clip: Clip,
    name: str,
    policy: Policy,
    size: int | None = None,
    question: str = "",
    warn: Callable[[str], None] = _warn,
) -> Video:
    """The frames of a clip that a policy chooses, and their times.

    `warn` gets what `load_media` warns of, about the clip with this `name`.
    """
    with part("open"):
        index = clip.index
    scored: dict[int, Any] = {}

    def decode(at: Sequence[int]) -> tuple[list[int], list[Any]]:
        read = _pictures(clip, at, size)
        scored.update(read)
        return sorted(read), [read[place] for place in sorted(read)]

    with part("select"):
        choice = policy.choose(index, decode, question)
    if choice.silence:
        warn(f"{name}: frames={str(policy)!r} takes evenly spaced frames: {choice.silence}.")
    if scored.keys() >= set(choice.places):
        read = {place: scored[place] for place in choice.places}
    else:
        read = _pictures(clip, choice.places, size)
    places = sorted(set(choice.places))
    if lost := sorted({*places} & ({*places} - read.keys() | clip.replaced)):
        warn(
            f"{name}: {len(lost)} of {len(places)} chosen frames cannot be decoded, the first is "
            f"number {lost[0]}. The frames shown before them are repeated."
        )
    if index.lacking > NEARLY * index.total:
        warn(
            f"{name}: {index.lacking} of {index.total + index.lacking} frames are missing. The "
            "file was cut off or is damaged; frames come from the parts that are there."
        )
    times = index.uneven_times(places)
    sampling = Sampling(tuple(places), index.total, index.fps, times, choice.rule)
    pictures, last = [], read[min(read)]
    for place in places:  # where one is missing, the picture before it, else the first
        last = read.get(place, last)
        pictures.append(last)
    return Video.of(pictures, sampling)


def open_clip(path: Path, decoder: str = "pyav") -> Clip:
    """Open the frames of a video; errors as in `load_media`."""
    if path.is_dir():
        return FolderClip(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return FileClip(path, decoder)
    return AnimationClip(path)


def _pictures(clip: Clip, at: Sequence[int], size: int | None) -> dict[int, Any]:
    """PIL images of the frames at some places."""
    with part("decode"):
        return clip.read(at, size)
