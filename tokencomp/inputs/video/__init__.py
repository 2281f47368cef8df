"""Videos: frames that were sampled, and their times.

The other files, in the order in which a video passes them:

    file ─► container ─► packets ─► frames ─► clips ─► Video ─► frame_times ─► processor
            (opened by   (times,    (policy)  (chosen  (with its (what the
             PyAV)        sizes)              decoded)  times)    processor writes)

`stream` and `focus`, with `scored`, are rules of `frames`, and `scorer` rates frames by a model.
`upright` turns decoded frames into pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokencomp.errors import MediaError


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video were sampled, by indices from 0, ascending.

    `total` counts the frames of the whole video, and `fps` are its frames per second, a mean if the
    rate varies, None if unknown. `times` are seconds from the first frame of the video; None if
    they follow from index and `fps`. `rule` says how the frames were chosen.
    """

    indices: tuple[int, ...]
    total: int
    fps: float | None = None
    times: tuple[float, ...] | None = None
    rule: str = "even"

    @property
    def seconds(self) -> list[float] | None:
        """Seconds of every frame from the first of the video; None if unknown."""
        if self.times is not None:
            return [*self.times]
        return None if self.fps is None else [index / self.fps for index in self.indices]

    def metadata(self) -> dict[str, Any]:
        """The sampling in the form of `video_metadata`, an argument of transformers' processors.

        Processors divide frame indices by the rate. If the rate varies, the indices are
        therefore given as at the mean rate, and need not be integers.
        """
        at: list[Any] = list(self.indices)
        if self.times is not None and self.fps is not None:
            at = [time * self.fps for time in self.times]
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "frames_indices": at,
            "duration": None if self.fps is None else self.total / self.fps,
        }


class Video(list[Any]):
    """A list of frames that knows when they were shown.

    Parameters
    ----------
    frames
        PIL images of one size.
    fps
        Frames per second of the video that `indices` count in; without `indices`, of `frames`.
        None if it is unknown: the processor then assumes a rate of its own.
    indices
        Number of each frame in the whole video; None is 0, 1, 2 …
    total
        Frames of the whole video; None is up to the last index.

    Raises
    ------
    MediaError
        `fps` is not positive, or `indices` do not fit the frames.
    """

    def __init__(
        self,
        frames: Iterable[Any],
        fps: float | None = None,
        indices: Sequence[int] | None = None,
        total: int | None = None,
    ) -> None:
        super().__init__(frames)
        at = tuple(range(len(self)) if indices is None else (int(i) for i in indices))
        ascending = len(at) == len(self) and list(at) == sorted(set(at)) and min(at, default=0) >= 0
        if not ascending or (fps is not None and not fps > 0):
            raise MediaError(
                f"fps={fps!r}, indices={indices!r} for {len(self)} frames: give a rate above 0, or "
                "None if unknown, and one number per frame, ascending from 0."
            )
        last = at[-1] + 1 if at else 0
        self.sampling = Sampling(at, last if total is None else max(int(total), last), fps)

    @classmethod
    def of(cls, frames: Iterable[Any], sampling: Sampling) -> Video:
        """A video of frames with known times."""
        video = cls(frames, sampling.fps, sampling.indices, sampling.total)
        video.sampling = sampling
        return video


def sampling_of(video: Sequence[Any]) -> Sampling:
    """The times of the frames; the frame rate of plain lists and arrays is unknown."""
    known = getattr(video, "sampling", None)
    return known or Sampling(tuple(range(len(video))), len(video))


def with_frames(
    video: Sequence[Any], frames: Iterable[Any], places: Sequence[int] | None = None
) -> Video:
    """Other pictures with the times of the frames of `video` at `places` (None: of all frames)."""
    known = sampling_of(video)
    kept = range(len(video)) if places is None else places
    times = None if known.times is None else tuple(known.times[k] for k in kept)
    indices = tuple(known.indices[k] for k in kept)
    return Video.of(frames, dataclasses.replace(known, indices=indices, times=times))
