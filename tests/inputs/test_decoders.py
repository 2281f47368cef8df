"""TorchCodec and decord give the frames of PyAV, or refuse; skipped where they are missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.clips import CODECS, pictures, write_clip

from tokencomp.errors import MediaError, OptionError
from tokencomp.inputs.media import load_media

pytest.importorskip("av")

FILES = {name: {} for name in CODECS if name != "gif"}  # Pillow reads animations
FILES |= {"h264 ": {"g": "16"}, "vp9 ": {"g": "16"}}  # several key frames
REFUSED = {
    "torchcodec": ("h264-refresh", "h264-ts", "mpeg2"),
    "decord": ("h264-open", "h264-refresh", "h264-ts", "hevc-open", "mpeg4", "mpeg2", "av1"),
}
"""Files of which TorchCodec 0.12 and decord 0.6 would give other frames, or none."""
COUNT = 60


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All files, written before a decoder brings its FFmpeg along."""
    return {
        name: write_clip(tmp_path_factory.mktemp("clip"), name.strip(), pictures(COUNT), **options)
        for name, options in FILES.items()
    }


@pytest.fixture(params=REFUSED)
def decoder(request: pytest.FixtureRequest, clips: dict[str, Path]) -> str:
    try:
        importlib.import_module(
            {"torchcodec": "torchcodec.decoders"}.get(request.param, request.param)
        )
    except (ImportError, OSError, RuntimeError) as error:  # TorchCodec raises these without FFmpeg
        pytest.skip(f"{request.param} cannot be imported ({error!r:.80})")
    return str(request.param)


def same(ours: Any, theirs: Any) -> None:
    for place, a, b in zip(ours.sampling.indices, ours, theirs, strict=True):
        apart = np.abs(np.asarray(a).astype(int) - np.asarray(b))
        assert apart.mean() < 1 and apart.max() <= 6, place  # colours are rounded differently


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("frames", [8, "stream:8", "3fps"])
def test_frames_are_those_of_pyav(
    clips: dict[str, Path], decoder: str, name: str, frames: Any
) -> None:
    ours = load_media(clips[name], frames)
    try:
        theirs = load_media(clips[name], frames, decoder=decoder)
    except MediaError as error:
        assert name in REFUSED[decoder] and 'decoder="pyav"' in str(error)
        return
    assert theirs.sampling == ours.sampling
    same(ours, theirs)


def test_size_and_errors(clips: dict[str, Path], decoder: str, tmp_path: Path) -> None:
    path = clips["h264"]
    assert {f.size for f in load_media(path, 4, size=48, decoder=decoder)} == {(48, 32)}
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:600])
    with pytest.raises(MediaError, match="decoded"):
        load_media(tmp_path / "cut.mp4", decoder=decoder)
    with pytest.raises((MediaError, OptionError)):
        load_media(path, decoder=f"{decoder}:nowhere")


class Reader:
    """Four frames at unequal times of a file that begins at 7 s."""

    def __len__(self) -> int:
        return 4

    def get_avg_fps(self) -> float:
        return 2.0

    def get_frame_timestamp(self, places: Any) -> np.ndarray:
        return np.array([(7, 7.5), (7.5, 8.5), (8.5, 8.75), (8.75, 9)])[[*places]]

    def get_batch(self, places: list[int]) -> np.ndarray:
        return np.zeros((len(places), 16, 16, 3), np.uint8)


def test_times_of_a_reader_begin_at_its_first_frame() -> None:
    assert load_media(Reader(), 4).sampling.times == (0, 0.5, 1.5, 1.75)


def test_a_reader_in_place_of_a_path(clips: dict[str, Path]) -> None:
    decord = pytest.importorskip("decord")
    ours = load_media(clips["h264"], 8)
    theirs = load_media(decord.VideoReader(str(clips["h264"])), 8)
    assert theirs.sampling.indices == ours.sampling.indices
    assert theirs.sampling.fps == pytest.approx(ours.sampling.fps)
    same(ours, theirs)
