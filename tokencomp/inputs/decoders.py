"""Other decoders of video files, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencomp.errors import MediaError, MissingDependencyError, OptionError
from tokencomp.inputs.packets import ClipIndex

Decode = Callable[[Path, Sequence[int], str, ClipIndex], list[np.ndarray]]
"""Frames at some places of a file, uint8 (height, width, 3) each, decoded on a device."""


def _torchcodec(
    path: Path, places: Sequence[int], device: str, index: ClipIndex
) -> list[np.ndarray]:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # it raises the last without FFmpeg
        raise _missing("torchcodec", "pip install torchcodec, and FFmpeg's libraries") from error
    more: dict[str, Any] = {"device": device} if device else {}
    use = 'Use decoder="pyav".'
    try:
        decoder = VideoDecoder(str(path), dimension_order="NHWC", **more)
        decoded = decoder.get_frames_at([*places])
    except (RuntimeError, IndexError, ValueError) as error:
        raise MediaError(f"TorchCodec cannot decode the chosen frames ({error}). {use}") from error
    if index.times is not None and index.fps:
        # In streams that cannot be searched exactly (MPEG-TS, intra refresh), it gives others.
        start = decoder.metadata.begin_stream_seconds or 0.0
        late = decoded.pts_seconds.numpy() - start - index.times[[*places]]
        if np.abs(late).max(initial=0.0) > 0.5 / index.fps:
            raise MediaError(f"TorchCodec gives other frames than the chosen ones. {use}")
    return list(decoded.data.cpu().numpy())


def _decord(path: Path, places: Sequence[int], device: str, index: ClipIndex) -> list[np.ndarray]:
    if device:
        raise OptionError(f"decoder='decord:{device}': decord decodes on the CPU alone.")
    try:
        import decord
    except ImportError as error:
        raise _missing("decord", "pip install decord") from error
    reader = decord.VideoReader(str(path), num_threads=1)
    return list(reader.get_batch([*places]).asnumpy())


def _missing(name: str, fix: str) -> MissingDependencyError:
    return MissingDependencyError(
        f'decoder="{name}" cannot be imported. Install it ({fix}), or use decoder="pyav".'
    )


DECODERS: dict[str, Decode | None] = {"pyav": None, "torchcodec": _torchcodec, "decord": _decord}
"""None: PyAV, which decodes in `VideoFile`."""
