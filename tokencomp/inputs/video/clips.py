"""Clips: count the frames first, read chosen ones afterwards. Files, animations, folders."""

from __future__ import annotations

import contextlib
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokencomp.errors import MediaError, MissingDependencyError, TokenCompError, install
from tokencomp.inputs.clock import part
from tokencomp.inputs.images import Image, load_image, on_white, seconds_shown
from tokencomp.inputs.video.container import VideoFile
from tokencomp.inputs.video.packets import ClipIndex, animation_index
from tokencomp.inputs.video.upright import rgb, scaled_size, shown_size

PICTURES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp"])
THREADS = 8
INSTEAD = 'Use decoder="pyav".'
MEND = "Check the file with ffprobe, or encode it again as H.264 MP4."
UNSEARCHED = frozenset(["mpegts", "mpeg"])
"""Containers without an index."""


class Clip(contextlib.AbstractContextManager["Clip"]):
    """The frames of a video. Close it, or use it in a `with` block."""

    @property
    @abstractmethod
    def index(self) -> ClipIndex:
        """Number and times of the frames."""

    @abstractmethod
    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        """RGB pictures of the frames at `places`, whose longer side has at most `size` pixels.

        Some that are damaged may be missing.
        """

    @property
    def replaced(self) -> set[int]:
        """Places of damaged frames that `read` gave another picture."""
        return set()

    def close(self) -> None:
        """Close the file; most clips hold nothing open."""

    def __exit__(self, *_: Any) -> None:
        self.close()


class FileClip(Clip):
    """A video file.

    `decoder`, see `load_media`, decodes the chosen frames; packets are always read with PyAV.
    """

    def __init__(self, path: Path, decoder: str = "pyav") -> None:
        self.path, (self._decoder, _, self.device) = path, decoder.partition(":")
        try:
            import av
        except ImportError:
            raise MissingDependencyError(
                f"{path}: reading a video needs PyAV: {install('media')}."
            ) from None
        import torch

        threads = min(torch.get_num_threads(), THREADS)  # as many as the user gives to the model
        with self._readable():
            self.file = VideoFile(lambda: av.open(str(path)), threads)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Convert errors of libraries to errors about this file."""
        try:
            yield
        except MediaError as error:
            raise MediaError(f"{self.path}: {error}") from None
        except (TokenCompError, MemoryError):
            raise
        except Exception as error:  # decoders raise undocumented types
            text = str(error).strip().splitlines()[0] if str(error) else repr(error)
            raise MediaError(
                f"{self.path}: no frame of this video can be decoded ({text}). {MEND}"
            ) from error

    @cached_property
    def index(self) -> ClipIndex:
        with self._readable():
            return self.file.index

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        if not places:
            return {}
        with self._readable():
            if self._decoder != "pyav":
                decode = _decord_frames if self._decoder == "decord" else _torchcodec_frames
                arrays = decode(self, places)
                pairs = zip(places, arrays, strict=True)
                return {place: _shrunk(Image.fromarray(a), size) for place, a in pairs}
            return {place: Image.fromarray(a) for place, a in self._arrays(places, size)}

    def _arrays(self, places: Sequence[int], size: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """Decode the frames at `places`, uint8 (height, width, 3) each, with PyAV.

        Frames of a file that changes its size are scaled to the first.
        """
        wanted = None
        for place, frame in self.file.frames(places):
            wanted = wanted or scaled_size(*shown_size(frame), size)
            with part("resize"):
                picture = rgb(frame, wanted)
            yield place, picture
        if wanted is None:
            raise MediaError(f"none of the chosen frames can be decoded. {MEND}")

    @property
    def replaced(self) -> set[int]:
        return self.file.replaced

    def close(self) -> None:
        self.file.close()


def _torchcodec_frames(clip: FileClip, places: Sequence[int]) -> list[np.ndarray]:
    """Decode the frames with these indices, uint8 (height, width, 3) each."""
    index = clip.index
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # it raises the last without FFmpeg
        raise MissingDependencyError(
            'decoder="torchcodec" cannot be imported. Install it (pip install torchcodec, and '
            f"FFmpeg's libraries). {INSTEAD}"
        ) from error
    more: dict[str, Any] = {"device": clip.device} if clip.device else {}
    try:
        decoder = VideoDecoder(str(clip.path), dimension_order="NHWC", **more)
        decoded = decoder.get_frames_at([*places])
    except (RuntimeError, IndexError, ValueError) as error:
        raise MediaError(
            f"TorchCodec cannot decode the chosen frames ({error}). {INSTEAD}"
        ) from error
    if index.times is not None and index.fps:
        # In streams that cannot be searched exactly (MPEG-TS, intra refresh), it gives others.
        start = decoder.metadata.begin_stream_seconds or 0.0
        late = decoded.pts_seconds.numpy() - start - index.times[[*places]]
        if np.abs(late).max(initial=0.0) > 0.5 / index.fps:
            raise MediaError(f"TorchCodec gives other frames than the chosen ones. {INSTEAD}")
    return list(decoded.data.cpu().numpy())


def _decord_frames(clip: FileClip, places: Sequence[int]) -> list[np.ndarray]:
    """Decode the frames with these indices, uint8 (height, width, 3) each.

    decord 0.6 silently returns other frames if a picture is shown before a key frame and decoded
    after it (open groups, intra refresh), and in MPEG streams, which have no index.
    """
    try:
        import decord
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f'decoder="decord" cannot be imported: {install("decord")}. {INSTEAD}'
        ) from error
    index = clip.index
    if clip.file.format in UNSEARCHED or index.packets is None or index.packets.leading:
        raise MediaError(f"decord gives other frames of such files than the chosen ones. {INSTEAD}")
    try:
        reader = decord.VideoReader(str(clip.path))
        total, arrays = len(reader), reader.get_batch([*places]).asnumpy()
    except (decord.DECORDError, IndexError) as error:
        raise MediaError(f"decord cannot decode the chosen frames. {INSTEAD}") from error
    if total != index.total:
        raise MediaError(f"decord counts {total} frames, and there are {index.total}. {INSTEAD}")
    return list(arrays)


class ReaderClip(Clip):
    """A `decord.VideoReader`, or an object with its methods."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    @cached_property
    def index(self) -> ClipIndex:
        total, rate = len(self.reader), float(self.reader.get_avg_fps())
        times = np.asarray(self.reader.get_frame_timestamp(range(total)), np.float64)[:, 0]
        return ClipIndex(total, rate or None, times - times[0], "reader")

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        if not places:
            return {}
        batch = self.reader.get_batch([*places])
        arrays = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
        pairs = zip(places, arrays, strict=True)
        return {place: _shrunk(Image.fromarray(a), size) for place, a in pairs}


def is_reader(value: Any) -> bool:
    """Whether a value is a `decord.VideoReader`, or has its methods."""
    return all(hasattr(value, n) for n in ("get_batch", "get_frame_timestamp", "get_avg_fps"))


class AnimationClip(Clip):
    """An animated GIF or WebP, or the pages of a TIFF."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def index(self) -> ClipIndex:
        with self._opened() as image:
            shown = []
            for place in range(self._total(image)):
                self._seek(image, place)
                shown.append(seconds_shown(image))
            return animation_index(shown, str(image.format).lower())

    def read(self, places: Sequence[int], size: int | None) -> dict[int, Image.Image]:
        found = {place: _shrunk(picture, size) for place, picture in self._pictures(places)}
        return _of_one_size(found, self.path)

    def _pictures(self, places: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """RGB pictures of the frames at `places`."""
        wanted = set(places)
        with self._opened() as image:
            for place in range(max(wanted, default=-1) + 1):
                self._seek(image, place)
                if place in wanted:
                    yield place, on_white(image)

    def _total(self, image: Image.Image) -> int:
        return getattr(image, "n_frames", 1)

    def _seek(self, image: Image.Image, place: int) -> None:
        image.seek(place)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.path) as image:
                yield image
        except (OSError, ValueError, EOFError) as error:
            raise MediaError(f"{self.path}: the animation is damaged ({error}).") from error


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
        return _of_one_size(found, self.path)


def _of_one_size(found: dict[int, Image.Image], path: Path) -> dict[int, Image.Image]:
    """Check that all frames have the same size, and return them."""
    sizes = {image.size for image in found.values()}
    if len(sizes) > 1:
        raise MediaError(
            f"{path}: frames differ in size ({sorted(sizes)}). Resize them to one size, or give "
            "them as pictures of their own."
        )
    return found


def _natural(path: Path) -> tuple[list[Any], str]:
    """Sort key that orders frame2 before frame10."""
    parts: list[Any] = re.split(r"(\d+)", path.stem)
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


def _shrunk(image: Image.Image, size: int | None) -> Image.Image:
    wanted = scaled_size(*image.size, size)
    with part("resize"):
        return image if wanted == image.size else image.resize(wanted, Image.Resampling.BICUBIC)
