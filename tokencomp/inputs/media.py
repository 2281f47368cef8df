"""Reading image and video files, with errors that say what is wrong with the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tokencomp.errors import MediaError, MissingDependencyError, install

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ModuleNotFoundError:
    raise MissingDependencyError(f"reading images needs Pillow: {install('media')}.") from None

from tokencomp.inputs.video import Video

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".wmv",
        ".flv",
        ".ts",
        ".3gp",
        ".ogv",
    ]
)

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot open."""


def is_video(path: str | Path) -> bool:
    """Whether `path` is a video: by suffix, a folder of frames, or an animated picture."""
    path = Path(path)
    if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir():
        return True
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except UNREADABLE:  # `load_image` says what is wrong with it
        return False


def load_media(path: str | Path, frames: int = 8) -> Image.Image | Video:
    """Read an image, or evenly spaced frames of a video.

    Parameters
    ----------
    path : str or Path
        An image file, a video file, an animated GIF/WebP, or a folder of frame images.
    frames : int
        Frames to take from a video: the middles of `frames` equal parts. A shorter video gives all
        the frames it has.

    Returns
    -------
    PIL.Image.Image or Video
        RGB. A video is a list of frames that knows when they were shown; the frame rate is read
        from the file, and unknown for a folder of frame images.

    Raises
    ------
    MediaError
        File missing, empty, corrupt or without frames; `frames` below 1.
    MissingDependencyError
        A video, and neither decord nor PyAV is installed.
    """
    path = Path(path)
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise MediaError(f"frames={frames!r}: a video needs at least 1 frame; use e.g. frames=8.")
    if not path.exists():
        raise MediaError(f"{path}: no such file. Give the path of a local image or video.")
    if path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes). Download or export it again.")
    return load_video(path, frames) if is_video(path) else load_image(path)


def load_image(path: str | Path) -> Image.Image:
    """Read one image as RGB, upright (EXIF orientation applied). Raises `MediaError`."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image), image.format)
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from None
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{path}: neither an image that Pillow can read nor a known video suffix "
            f"({', '.join(sorted(VIDEO_SUFFIXES))}). Convert it to PNG, JPEG or MP4."
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: the image is too large; make it smaller ({error}).") from error
    except UNREADABLE as error:
        raise MediaError(f"{path}: the image is damaged ({error}).") from error


def to_rgb(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """An RGB picture of 8 bits per channel; 16-bit grey ones are scaled, not cut off.

    Parameters
    ----------
    file_format : str or None
        Of the file it was read from, as Pillow names it: of PNG and PPM, numbers of 32 bits are
        16-bit ones; of others, those up to 255 are 8-bit ones.

    Raises
    ------
    MediaError
        The picture has 32-bit numbers of unknown range.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high >= 1 << 16:
        raise MediaError(
            f"a picture of 32-bit numbers (mode {image.mode}, {low:g} to {high:g}), of unknown "
            "range. Save it with 8 or 16 bits per channel."
        )
    deep = image.mode != "I" or high > 255 or file_format in ("PNG", "PPM")
    return Image.fromarray((values // (257 if deep else 1)).astype(np.uint8)).convert("RGB")


def load_video(path: str | Path, frames: int = 8) -> Video:
    """Read evenly spaced frames with decord, or with PyAV where decord is missing or fails.

    Parameters and errors as in `load_media`.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, frames)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return _read_animation(path, frames)
    return _first_that_works(path, frames, (("decord", _read_decord), ("av", _read_pyav)))


Reader = Callable[[Path, int], Video]


def _first_that_works(path: Path, frames: int, readers: Iterable[tuple[str, Reader]]) -> Video:
    failures, missing = [], []
    for name, reader in readers:
        try:
            images = reader(path, frames)
        except ImportError:
            missing.append(name)
            continue
        except Exception as error:  # decoders raise their own, undocumented types
            failures.append(
                f"{name}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            )
            continue
        if images:
            return images
        failures.append(f"{name}: no frames")
    if not failures:
        raise MissingDependencyError(
            f"{path}: reading a video needs one of {', '.join(missing)}. Run {install('media')}."
        )
    raise MediaError(
        f"{path}: no frame of this video can be decoded ({'; '.join(failures)}). "
        "Check the file with ffprobe, or encode it again as H.264 MP4."
    )


def frame_indices(total: int, frames: int) -> list[int]:
    """Middles of `frames` equal parts of `total` frames; all of them when there are fewer."""
    if total <= frames:
        return list(range(total))
    return [int((k + 0.5) * total / frames) for k in range(frames)]


def _read_decord(path: Path, frames: int) -> Video:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    indices = frame_indices(len(reader), frames)
    images = [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]
    return Video(images, reader.get_avg_fps() or None, indices, len(reader))


def _read_pyav(path: Path, frames: int) -> Video:
    """Decodes the stream twice when the container does not tell how many frames it has."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError("no video stream")
        total, rate = container.streams.video[0].frames, container.streams.video[0].average_rate
    if not total:
        with av.open(str(path)) as container:
            total = sum(1 for _ in container.decode(video=0))
    chosen, images = frame_indices(total, frames), []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                images.append(Image.fromarray(frame.to_ndarray(format="rgb24")))
            if len(images) == len(chosen):
                break
    # A damaged file may end before the number of frames in its header.
    return Video(images, float(rate) if rate else None, chosen[: len(images)], total)


def _read_animation(path: Path, frames: int) -> Video:
    try:
        with Image.open(path) as image:
            total, images, milliseconds = getattr(image, "n_frames", 1), [], 0.0
            indices = frame_indices(total, frames)
            for index in range(total):
                image.seek(index)
                milliseconds += image.info.get("duration", 0)
                if index in indices:
                    images.append(to_rgb(image))
            rate = 1000 * total / milliseconds if milliseconds else None
            return Video(images, rate, indices, total)
    except (OSError, ValueError, EOFError) as error:
        raise MediaError(f"{path}: the animation is damaged ({error}).") from error


def _read_folder(path: Path, frames: int) -> Video:
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in suffixes)
    if not files:
        raise MediaError(
            f"{path}: the folder holds no frame images ({', '.join(sorted(suffixes))})."
        )
    indices = frame_indices(len(files), frames)
    images = [load_image(files[k]) for k in indices]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise MediaError(
            f"{path}: frames differ in size ({sorted(sizes)}). Resize them to one size."
        )
    return Video(images, None, indices, len(files))
