"""Frame policies: which frames of a clip are decoded.

A policy is a number of evenly spaced frames (`8`), a rate (`"1fps"`), bursts of the compressed
stream (`"stream:32"`), or a choice by the scores of a callable (`Scored`, in text
`"scorer:aks:8"`). It is deterministic and sees the index of the file; only `Scored` decodes
candidates first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tokencomp.errors import MediaError, OptionError
from tokencomp.inputs.video.focus import focus
from tokencomp.inputs.video.packets import ClipIndex
from tokencomp.inputs.video.scored import aks, checked_scores
from tokencomp.inputs.video.stream import silence, stream_choice

FORMS = '8 (evenly spaced), "1fps" (by time), "stream:8" (by bursts) or "scorer:aks:8" (by scores)'
RULES = ("aks", "focus")


@dataclass(frozen=True)
class Choice:
    """The indices of the chosen frames, ascending, and the rule in words.

    `silence` says why the rule was not applicable, so that frames are evenly spaced; "" if it was.
    """

    places: tuple[int, ...]
    rule: str
    silence: str = ""


Decode = Callable[[Sequence[int]], tuple[list[int], list[Any]]]
"""Decodes frames at places; returns the places that could be read, ascending, and PIL images."""


class Policy(Protocol):
    """Chooses frames of a clip. `str(policy)` is its text form."""

    def choose(self, index: ClipIndex, decode: Decode, question: str) -> Choice:
        """Choose frames; raises `MediaError` if the file does not have them."""


@dataclass(frozen=True)
class Even:
    """The middles of `count` equal parts of the clip; all frames if there are fewer."""

    count: int

    def __str__(self) -> str:
        return str(self.count)

    def choose(self, index: ClipIndex, decode: Decode, question: str) -> Choice:
        return Choice(tuple(frame_indices(index.total, self.count)), "even")


@dataclass(frozen=True)
class Rate:
    """A number of frames per second of the clip: those shown in the middles of equal intervals."""

    fps: float

    def __str__(self) -> str:
        return f"{self.fps:g}fps"

    def choose(self, index: ClipIndex, decode: Decode, question: str) -> Choice:
        if index.times is None or index.fps is None or index.duration is None:
            raise MediaError(
                f'frames="{self}": the clip does not say when its frames are shown. Give a number '
                "of frames, such as frames=8."
            )
        if self.fps > index.fps * (1 + 1e-3):
            raise MediaError(
                f'frames="{self}": the clip has {index.fps:.4g} frames per second. Ask for at most '
                "as many."
            )
        count = max(1, round(index.duration * self.fps))
        middles = (np.arange(count) + 0.5) / self.fps
        shown = np.searchsorted(index.times, middles, side="right") - 1
        return Choice(tuple(np.unique(shown).tolist()), "rate")


@dataclass(frozen=True)
class Stream:
    """`count` frames by the bursts of the compressed stream, see `stream.py`."""

    count: int

    def __str__(self) -> str:
        return f"stream:{self.count}"

    def choose(self, index: ClipIndex, decode: Decode, question: str) -> Choice:
        places, rule = stream_choice(index, self.count)
        return Choice(tuple(places), rule, silence(index))


@dataclass(frozen=True)
class Scored:
    """The frames that a rule takes by scores of candidates.

    Parameters
    ----------
    count
        Frames to take.
    scorer
        `scorer(frames, question)` gives one finite number per PIL image, the higher the better.
        None is for text such as "scorer:aks:8": a caller with a model puts its scorer there.
    rule
        "aks": AKS (2502.21271) scores one frame per second, and halves the clip where scores do not
        stand out. "focus": FOCUS (2510.27280) scores few frames first, and more where these promise
        most.
    """

    count: int
    scorer: Callable[[Sequence[Any], str], Any] | None = None
    rule: str = "aks"

    def __post_init__(self) -> None:
        _positive(self.count, "count", self.count)
        if self.rule not in RULES:
            raise OptionError(f"rule {self.rule!r} of a scorer: use one of {', '.join(RULES)}.")

    def __str__(self) -> str:
        return f"scorer:{self.rule}:{self.count}"

    def choose(self, index: ClipIndex, decode: Decode, question: str) -> Choice:
        if self.scorer is None:
            rule = "" if self.rule == "aks" else f', "{self.rule}"'
            raise OptionError(
                f'frames="{self}": there is no scorer. In Python give '
                f"Scored({self.count}, scorer{rule}) of tokencomp.inputs.video.frames, where "
                "scorer(frames, question) returns a number for every frame."
            )
        scorer = self.scorer

        def score(places: Sequence[int]) -> dict[int, float]:
            read, pictures = decode(places)  # for damaged frames, the ones shown instead
            values = checked_scores(scorer(pictures, question), len(read))
            return dict(zip(read, values.tolist(), strict=True))

        if self.rule == "focus":
            taken = focus(score, index.total, index.fps or 1.0, self.count)
        else:
            seconds = index.duration or 0.0
            known = score(frame_indices(index.total, max(self.count, round(seconds))))
            read = [*known]
            taken = [read[k] for k in aks(np.asarray([*known.values()]), self.count)]
        return Choice(tuple(taken), self.rule)


Frames = int | str | Policy


def frame_policy(frames: Frames) -> Policy:
    """The policy that a number or a text names, else `OptionError`; policies themselves pass."""
    if isinstance(frames, bool) or not isinstance(frames, int | str):
        if hasattr(frames, "choose"):
            return frames
        raise OptionError(f"frames={frames!r}: expected {FORMS}, or a frame policy.")
    text = str(frames).strip()
    if match := re.fullmatch(r"([+-]?\d+)", text):
        return Even(_positive(int(match[1]), "frames", frames))
    if match := re.fullmatch(r"([+-]?\d*\.?\d+)\s*fps", text):
        return Rate(_positive(float(match[1]), "frames", frames))
    if match := re.fullmatch(r"stream:([+-]?\d+)", text):
        return Stream(_positive(int(match[1]), "frames", frames))
    if match := re.fullmatch(r"scorer:(\w+):([+-]?\d+)", text):
        return Scored(_positive(int(match[2]), "frames", frames), None, match[1])
    raise OptionError(f"frames={frames!r} names no frame policy: expected {FORMS}.")


def plain_frames(frames: Frames) -> int | str:
    """The policy as a number or text, for results."""
    policy = frame_policy(frames)
    return policy.count if isinstance(policy, Even) else str(policy)


def _positive(value: Any, name: str, given: Any) -> Any:
    if isinstance(value, bool) or not value > 0:
        raise OptionError(f"{name}={given!r}: a video needs at least 1 frame; use e.g. frames=8.")
    return value


def frame_indices(total: int, frames: int) -> list[int]:
    """Middles of `frames` equal parts of `total` frames; all of them if there are fewer."""
    if total <= frames:
        return list(range(total))
    return [int((k + 0.5) * total / frames) for k in range(frames)]
