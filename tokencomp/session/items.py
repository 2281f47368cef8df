"""Input of a session: images and chunks of frames, checked, with their times."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tokencomp.errors import FrameChoiceWarning, FrameOrderError, MediaError, OptionError
from tokencomp.inputs.prompts import chat_inputs
from tokencomp.inputs.video import Sampling, sampling_of
from tokencomp.inputs.video.frame_times import frames_of_a_step
from tokencomp.validation import fits

CLOCK = 1000
"""Ticks per second in which the times of frames are handed to a processor."""


class FrameClock:
    """Times of the frames of a session, which ascend.

    `last`: seconds of the last frame; `step`: seconds between the last two.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.step = 1.0

    def times(self, frames: Sequence[Any], seconds: Any, needed: bool) -> list[float] | None:
        """Seconds of every frame, or None if they are unknown and not needed.

        `seconds` is one time per frame, or the distance between frames; None: those of a `Video`.
        They are `needed` if the processor writes times.
        """
        if seconds is None:
            times = sampling_of(frames).seconds
            if times is None and needed:
                raise OptionError(
                    "append(frames): the model reads when each frame was shown. Allowed: "
                    "seconds=[…] with one time per frame, seconds=0.5 for frames half a second "
                    "apart that follow the last ones, or a tokencomp.inputs.video.Video(frames, "
                    "fps=…)."
                )
        elif fits(seconds, float):
            if not seconds > 0:
                raise OptionError(
                    f"append: seconds={seconds!r}; allowed: a distance above 0 between frames, or "
                    "one time per frame."
                )
            first = 0.0 if self.last is None else self.last + seconds
            times = [first + i * seconds for i in range(len(frames))]
        else:
            times = _listed(seconds, len(frames))
        if times is not None:
            self._check(times)
        return times

    def advance(self, times: Sequence[float] | None) -> None:
        """Record that frames with these times were added."""
        if times:
            before = times[-2] if len(times) > 1 else self.last
            self.step = times[-1] - before if before is not None else self.step
            self.last = times[-1]

    def sampling(self, times: Sequence[float]) -> Sampling:
        """The times in the form of `frame_times`, with the rate of these frames (Qwen2.5-VL)."""
        before = [self.last] if self.last is not None and len(times) == 1 else []
        known = [*before, *times]
        step = (known[-1] - known[0]) / (len(known) - 1) if len(known) > 1 else self.step
        total = max(1, round(len(times) * step * CLOCK))
        return Sampling(tuple(round(t * CLOCK) for t in times), total, float(CLOCK))

    def _check(self, times: list[float]) -> None:
        known = times if self.last is None else [self.last, *times]
        for earlier, later in itertools.pairwise(known):
            if later <= earlier:
                raise FrameOrderError(
                    f"frames out of order: one of {later:g} s follows one of {earlier:g} s. "
                    "Allowed are times that ascend, also over the calls of append"
                    + ("" if self.last is None else f" (the last frame was at {self.last:g} s)")
                    + ". Sort the frames, or open a new session for another video. Nothing was "
                    "added."
                )


def _listed(seconds: Any, count: int) -> list[float]:
    try:
        times = [float(t) for t in seconds]
    except (TypeError, ValueError):
        times = []
    if len(times) != count or not np.isfinite(times).all():
        raise OptionError(
            f"append: seconds={seconds!r} for {count} frames; allowed: one finite time per frame, "
            "or one distance between frames."
        )
    return times


def warn_of_repeated(processor: Any, frames: Sequence[Any], inputs: dict[str, Tensor]) -> None:
    """Warn if a processor that joins frames into steps has repeated the last one."""
    grids, size = inputs.get("video_grid_thw"), frames_of_a_step(processor)
    if grids is None or size == 1:
        return
    repeated = int(grids[:, 0].sum()) * size - len(frames)
    if repeated > 0:
        warnings.warn(
            f"append: the model joins {size} frames into one step, so the last of {len(frames)} "
            f"frames is shown {repeated + 1} times, at its time, and takes the rows of a step. "
            f"Append a multiple of {size} to spare them.",
            FrameChoiceWarning,
            stacklevel=3,
        )


def item_inputs(
    processor: Any, text: str, modality: str, medium: Any, sampling: Sampling | None
) -> dict[str, Tensor]:
    """Arguments of the model for one item and its surrounding text, by name."""
    images, videos = ([], [medium]) if modality == "video" else ([medium], [])
    samplings = [] if sampling is None else [sampling]
    try:
        inputs = chat_inputs(
            processor, [[]], images, videos, samplings, [text], add_special_tokens=False
        )
    except ValueError as error:
        size = getattr(medium, "shape", None) or medium.size
        raise MediaError(
            f"the model's processor refuses this {modality} of {size}: {error}"
        ) from error
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and k != "attention_mask"}
