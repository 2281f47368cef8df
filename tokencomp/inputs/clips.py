"""Clips, whose frames are counted first and read afterwards: files, animations, folders."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokencomp.errors import MediaError, MissingDependencyError, TokenCompError, install
from tokencomp.inputs.clock import part
from tokencomp.inputs.container import VideoFile
from tokencomp.inputs.decoders import DECODERS
from tokencomp.inputs.images import Image, load_image, on_white, seconds_shown
from tokencomp.inputs.packets import ClipIndex, animation_index
from tokencomp.inputs.upright import rgb, scaled_size, shown_size

PICTURES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp"])
THREADS = 8


class Clip(ABC):
    """The frames of a video. Close it, or use it in a `with` block."""

    @property
    @abstractmethod
    def index(self) -> ClipIndex:
        """How many frames there are, and when they are shown."""

    @abstractmethod
    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        """RGB pictures of the frames at `places`, whose longer side has at most `size` pixels.

        A damaged frame is missing; the one shown before it may be there instead.
        """

    def close(self) -> None:  # noqa: B027  # most clips hold nothing open
        """Close the file."""

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class FileClip(Clip):
    """A video file.

    Parameters
    ----------
    decoder
        Decodes the chosen frames; the packets are always read with PyAV.
    """

    def __init__(self, path: Path, decoder: str = "pyav") -> None:
        self.path, (name, _, self.device) = path, decoder.partition(":")
        self._decoder = DECODERS[name]
        try:
            import av
        except ImportError:
            raise MissingDependencyError(
                f"{path}: reading a video needs PyAV: {install('media')}."
            ) from None
        import torch

        threads = min(torch.get_num_threads(), THREADS)  # as many as the user gives to the model
        self.file = self._readable(lambda: VideoFile(lambda: av.open(str(path)), threads))

    def _readable(self, work: Any) -> Any:
        """What `work` returns; errors of libraries become those of this file."""
        try:
            return work()
        except MediaError as error:
            raise MediaError(f"{self.path}: {error}") from None
        except (TokenCompError, MemoryError):
            raise
        except Exception as error:  # decoders raise their own, undocumented types
            text = str(error).strip().splitlines()[0] if str(error) else repr(error)
            raise MediaError(
                f"{self.path}: no frame of this video can be decoded ({text}). Check the file with "
                "ffprobe, or encode it again as H.264 MP4."
            ) from error

    @cached_property
    def index(self) -> ClipIndex:
        index: ClipIndex = self._readable(lambda: self.file.index)
        return index

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        def work() -> dict[int, Image.Image]:
            if self._decoder is not None:
                arrays = self._decoder(self.path, places, self.device, self.index)
                pairs = zip(places, arrays, strict=True)
                return {place: _shrunk(Image.fromarray(a), size) for place, a in pairs}
            wanted = 0, 0
            found: dict[int, Image.Image] = {}
            for place, frame in self.file.frames(places):
                if not found:  # frames of a file that changes its size have that of the first
                    wanted = scaled_size(*shown_size(frame), size)
                with part("resize"):
                    found[place] = Image.fromarray(rgb(frame, wanted))
            return found

        found: dict[int, Image.Image] = self._readable(work)
        if not found:
            raise MediaError(
                f"{self.path}: none of the chosen frames can be decoded. Check the file with "
                "ffprobe, or encode it again as H.264 MP4."
            )
        return found

    def close(self) -> None:
        self.file.close()


class AnimationClip(Clip):
    """An animated GIF or WebP."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def index(self) -> ClipIndex:
        try:
            with Image.open(self.path) as image:
                total, codec = getattr(image, "n_frames", 1), str(image.format).lower()
                shown = [seconds_shown(image, place) for place in range(total)]
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        return animation_index(shown, codec)

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        wanted, found = set(places), {}
        try:
            with Image.open(self.path) as image:
                for place in range(max(wanted, default=-1) + 1):
                    image.seek(place)
                    if place in wanted:
                        found[place] = _shrunk(on_white(image), size)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        return found

    def _damaged(self, error: Exception) -> MediaError:
        return MediaError(f"{self.path}: the animation is damaged ({error}).")


class FolderClip(Clip):
    """A folder of frame images, in the order of their names; numbers in names count as numbers."""

    def __init__(self, path: Path) -> None:
        files = (f for f in path.iterdir() if f.suffix.lower() in PICTURES)
        self.files = sorted(files, key=_natural)
        self.path = path
        if not self.files:
            raise MediaError(
                f"{path}: the folder holds no frame images ({', '.join(sorted(PICTURES))})."
            )

    @property
    def index(self) -> ClipIndex:
        return ClipIndex(len(self.files))

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        found = {place: _shrunk(load_image(self.files[place]), size) for place in places}
        sizes = {image.size for image in found.values()}
        if len(sizes) > 1:
            raise MediaError(
                f"{self.path}: frames differ in size ({sorted(sizes)}). Resize them to one size."
            )
        return found


def _natural(path: Path) -> tuple[list[Any], str]:
    """What sorts frame2 before frame10."""
    parts: list[Any] = re.split(r"(\d+)", path.stem)
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


def _shrunk(image: Image.Image, size: int | None) -> Image.Image:
    wanted = scaled_size(*image.size, size)
    with part("resize"):
        return image if wanted == image.size else image.resize(wanted, Image.Resampling.BICUBIC)
