"""TorchCodec gives the frames of PyAV, or refuses; skipped where it cannot be imported."""

from __future__ import annotations

import numpy as np
import pytest
from support.clips import CODECS, pictures, write_clip

from tokencomp.errors import MediaError, OptionError
from tokencomp.inputs.media import load_media

pytest.importorskip("av")
try:
    import torchcodec.decoders  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:  # it raises the last two without FFmpeg
    pytest.skip(f"TorchCodec cannot be imported ({error!r:.80})", allow_module_level=True)

FILES = [name for name in CODECS if name != "gif"]  # Pillow reads animations
SEARCHED = ("h264-refresh", "h264-ts", "mpeg2")
"""Files that cannot be searched exactly: TorchCodec 0.12 gives other frames."""
COUNT = 60


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("frames", [8, "stream:8", "3fps"])
def test_frames_are_those_of_pyav(tmp_path, name, frames):
    path = write_clip(tmp_path, name, pictures(COUNT))
    ours = load_media(path, frames)
    try:
        theirs = load_media(path, frames, decoder="torchcodec")
    except MediaError as error:
        assert name in SEARCHED and 'decoder="pyav"' in str(error)
        return
    assert theirs.sampling == ours.sampling
    for place, a, b in zip(ours.sampling.indices, ours, theirs, strict=True):
        apart = np.abs(np.asarray(a).astype(int) - np.asarray(b))
        assert apart.mean() < 1 and apart.max() <= 6, place  # colours are rounded differently


def test_size_and_errors(tmp_path):
    path = write_clip(tmp_path, "h264", pictures(COUNT))
    assert {f.size for f in load_media(path, 4, size=48, decoder="torchcodec")} == {(48, 32)}
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:600])
    with pytest.raises(MediaError, match="decoded"):
        load_media(tmp_path / "cut.mp4", decoder="torchcodec")
    with pytest.raises((MediaError, OptionError)):
        load_media(path, decoder="torchcodec:nowhere")
