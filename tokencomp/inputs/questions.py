"""Questions: a prompt about media, and the right answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokencomp.inputs.facts import Facts
from tokencomp.inputs.video.frames import Frames
from tokencomp.inputs.words import plain_words

Media = Any
"""A path, a PIL image, a list of PIL images (a video), or mono samples of sound, float (n,)."""

LETTERS = "ABCDEFGH"
SMALL = LETTERS.lower()
HASHED = 1 << 20
"""Bytes at either end of a file that are hashed: videos may be gigabytes."""


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes
    ----------
    id
        Unique in its data set; results are paired by it.
    prompt
        Text after the media.
    answer
        The right answer: words, or the letter of an option.
    media
        Images, videos and sounds in prompt order: paths, PIL images, lists of PIL images, and
        samples (n,) at 16 kHz. One that is no list may stand alone, without a tuple.
    family
        Group for per-family accuracy.
    also
        Other answers that count as right; training learns `answer`.
    facts
        Facts that a right answer is made of; `answer` is one that says all of them.
    """

    id: str
    prompt: str
    answer: str
    media: tuple[Media, ...] = ()
    family: str = ""
    also: tuple[str, ...] = field(default=(), kw_only=True)
    facts: Facts | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.media, str | Path) or hasattr(self.media, "size"):  # PIL, arrays
            object.__setattr__(self, "media", (self.media,))

    @property
    def replies(self) -> tuple[str, ...]:
        """Texts that are right: all answers, and the letters of answers that are options."""
        answers = (self.answer, *self.also)
        return *answers, *(match[1] for match in map(_option, answers) if match)

    def load(self, frames: Frames) -> list[Any]:
        """The media, decoded; `frames` as in `load_media`."""
        return [self._decoded(m, frames) if isinstance(m, str | Path) else m for m in self.media]

    def contents(self) -> str:
        """A hash of the content of media files; "" without any, or if one is missing."""
        try:
            files = [_contents(Path(m)) for m in self.media if isinstance(m, str | Path)]
        except OSError:
            return ""
        return hashlib.sha256(b"".join(files)).hexdigest()[:16] if files else ""

    def _decoded(self, path: str | Path, frames: Frames) -> Any:
        from tokencomp.inputs.media import load_media
        from tokencomp.inputs.sounds import is_sound, load_sound

        return load_sound(path) if is_sound(path) else load_media(path, frames, None, self.prompt)

    def correct(self, prediction: str) -> bool:
        """Whether `prediction` is right: the same words or option letter, or all of the facts."""
        if self.facts is not None:
            return all(self.facts.found(prediction).kept)
        return any(_same(prediction, one, self.prompt) for one in (self.answer, *self.also))


@dataclass(frozen=True)
class Deferred(Example):
    """An example whose media are created or opened when they are loaded.

    `source` returns the media; `media` is empty.
    """

    source: Callable[[], tuple[Media, ...]] = tuple

    def load(self, frames: Frames) -> list[Any]:
        return Example(self.id, self.prompt, self.answer, self.source()).load(frames)


def _contents(path: Path) -> bytes:
    """A hash of the size and both ends of a file, or of all files of a folder."""
    if path.is_dir():
        held = b"".join(_contents(p) for p in sorted(path.iterdir()) if p.is_file())
    else:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HASHED)
            file.seek(max(HASHED, size - HASHED))
            held = b"%d " % size + head + file.read()
    return hashlib.sha256(held).digest()


def has_video(example: Example) -> bool:
    """Whether a video is among the media; batches of images and videos are padded to the videos."""
    from tokencomp.inputs.media import is_video

    media = [m for m in example.media if not hasattr(m, "size")]
    return any(isinstance(m, list) or is_video(m) for m in media)


def option_letter(text: str) -> str:
    """The option that a reply such as "B", "(B)", "B. red" or "red (B)" names; "" if none.

    "A red circle" names none: there, A is an article. Of small letters, "b", "b. red" and "red (b)"
    name option B, and "b red" none.
    """
    match = re.match(rf"\W*([{LETTERS}])(?![\w'])(?!(?<=A)\s+\w)", text)
    match = match or re.search(rf"\(([{LETTERS}])\)", text)
    match = match or re.match(rf"\W*([{SMALL}])(?:[.):](?!\w)|\W*$)", text)
    match = match or re.search(rf"(?<!\w)\(([{SMALL}])\)", text)
    return match[1].upper() if match else ""


def _same(prediction: str, answer: str, prompt: str) -> bool:
    words = plain_words(answer)
    if plain_words(prediction) == words:
        return True
    option = _option(answer)
    if option is None or option_letter(prediction) != option[1].upper():
        return False
    # "E. coli" is an option where the question has it; else, a reply of one letter alone names it.
    return not option[2] or words in plain_words(prompt) or len(plain_words(prediction)) == 1


def _option(answer: str) -> re.Match[str] | None:
    """The letter and the words of a right answer such as "B" or "B. yield"."""
    return re.fullmatch(rf"[(\[]?([{LETTERS}{SMALL}])(?:[.):\]]+(\s.*)?)?", answer.strip(), re.S)


def modality_of(media: Media) -> Literal["image", "video", "audio"]:
    """ "video" for a list or an array of frames, "audio" for an array (n,), else "image"."""
    axes = media.ndim if isinstance(media, np.ndarray) else 0
    if axes == 1:
        return "audio"
    is_video = isinstance(media, list) or axes == 4
    return "video" if is_video else "image"


def frames_apart(media: Sequence[Media]) -> list[Any]:
    """The media with every video replaced by its frames, as images."""
    groups: Iterable[Any] = (one if modality_of(one) == "video" else [one] for one in media)
    return [one for group in groups for one in group]
