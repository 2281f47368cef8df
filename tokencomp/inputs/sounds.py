"""Reading sound files: mono samples at the rate that speech encoders take."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokencomp.errors import MediaError, MissingDependencyError, install
from tokencomp.inputs.access import check_readable

RATE = 16_000
"""Samples per second, as for Whisper's spectrograms, which models that listen read."""
SOUND_SUFFIXES = frozenset((".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac"))


def is_sound(path: str | Path) -> bool:
    """Whether `path` is a sound, by suffix."""
    return Path(path).suffix.lower() in SOUND_SUFFIXES


def load_sound(path: str | Path) -> np.ndarray:
    """Read a sound file: float32 (n,) in about [-1, 1], channels averaged, `RATE` per second.

    Raises `MediaError` for a file that is missing, may not be read, is damaged or has no sound.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise MissingDependencyError(f"reading sounds needs PyAV: {install('media')}.") from None
    check_readable(Path(path), "sound file")
    resampler = av.AudioResampler(format="fltp", rate=RATE)
    try:
        with av.open(str(path)) as file:
            if not file.streams.audio:
                raise MediaError(f"{path}: the file has no sound. Give one with an audio stream.")
            frames = [out for one in file.decode(audio=0) for out in resampler.resample(one)]
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: the sound is damaged ({error}). Export it again.") from error
    parts = [frame.to_ndarray().mean(0) for frame in (*frames, *resampler.resample(None))]
    if not sum(map(len, parts)):
        raise MediaError(f"{path}: the sound is empty. Give a file with an audio stream.")
    return np.concatenate(parts).astype(np.float32)
