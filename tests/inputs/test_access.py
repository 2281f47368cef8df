"""Media that this user may not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.clips import pictures, write_clip
from support.unprivileged import open_folder, without

from tokencomp.errors import MediaError
from tokencomp.inputs.media import load_media
from tokencomp.inputs.questions import Example, has_video
from tokencomp.inputs.sounds import load_sound

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def media() -> Iterator[Path]:
    with open_folder() as folder:
        frames = pictures(3)
        Image.fromarray(frames[0]).save(folder / "a.png")
        write_clip(folder, "h264", frames)
        write_clip(folder, "gif", frames)
        (folder / "a.wav").write_bytes(b"RIFF")
        (folder / "frames").mkdir()
        for k, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / "frames" / f"{k}.png")
        load_media(folder / "h264.mp4")  # imports what reads it, while everything may be read
        yield folder


NAMES = ["a.png", "h264.mp4", "gif.gif", "a.wav", "frames"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["itself", "its folder"])
def test_the_missing_permission_is_named(media: Path, name: str, what: str) -> None:
    example = Example("0", "What?", "x", (str(media / name),))
    with without(media / name if what == "itself" else media):
        has_video(example)
        assert example.contents() == ""
        with pytest.raises(MediaError) as raised:
            example.load(2)
    assert str(raised.value).startswith(f"{media / name}: no permission to read it. Change the")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.png", "none.png"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(MediaError, match="no such file"):
        load_media(name)


@pytest.mark.parametrize("load", [load_media, load_sound])
@pytest.mark.parametrize("kind", [str, Path])
def test_addresses_are_not_read(load: Any, kind: Any) -> None:
    """A path has lost one of the slashes."""
    with pytest.raises(MediaError, match=r"https://host/a\.wav: URLs are not read"):
        load(kind("https://host/a.wav"))
