"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.errors import OptionError

Model = Annotated[
    str, typer.Option("--model", "-m", help="Embedded model, local folder, or hub id.")
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", "-i", help="Image file; may be given again.")
]
Videos = Annotated[
    list[Path] | None, typer.Option("--video", "-v", help="Video file; may be given again.")
]
Question = Annotated[str, typer.Option("--question", "-q", help="What to ask.")]
Reducers = Annotated[
    str, typer.Option("--reducer", "-r", help="Reducers, separated by commas (tokencomp list).")
]
Ratios = Annotated[
    str, typer.Option("--ratio", help="Ratios in [0, 1), separated by commas; 0 = off.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Reducer option; may be given again."),
]
Frames = Annotated[int, typer.Option("--frames", min=1, help="Frames read from a video.")]
Device = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda", "cuda:1", ...')]
Dtype = Annotated[str, typer.Option("--dtype", help='"auto", float32, bfloat16, float16.')]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def names(text: str) -> list[str]:
    """ "aim, prune" → ["aim", "prune"], duplicates removed."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise OptionError(f"{text!r}: expected one or more names separated by commas.")
    return found


def ratios(text: str) -> list[float]:
    """ "0.5,0.75" → [0.5, 0.75], checked."""
    from tokencomp.plan import check_ratio

    return list(dict.fromkeys(check_ratio(part) for part in names(text)))  # type: ignore[arg-type]


def reducer_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """["weighted=false", "schedule=fastv"] → {"weighted": False, "schedule": "fastv"}."""
    found = {}
    for pair in pairs or ():
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise OptionError(f"--set {pair!r}: expected NAME=VALUE, e.g. --set schedule=fastv.")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def check_reducers(given: Sequence[str]) -> None:
    """Raise `UnknownNameError` before a model is loaded for nothing."""
    from tokencomp.errors import unknown_name
    from tokencomp.evaluation.settings import INPUT_BASELINES
    from tokencomp.reducers.base import available_reducers

    known = {"auto", *INPUT_BASELINES, *available_reducers()}
    for name in given:
        if name not in known:
            raise unknown_name("reducer", name, known)


def load_files(
    images: Sequence[Path] | None, videos: Sequence[Path] | None, frames: int
) -> list[Any]:
    """PIL images, and lists of PIL images for videos. Raises `MediaError`."""
    from tokencomp.media import load_media

    loaded = [load_media(path, frames) for path in images or ()]
    for path in videos or ():
        media = load_media(path, frames)
        loaded.append(media if isinstance(media, list) else [media])
    return loaded


def settings_for(chosen: list[str], at: list[float], options: dict[str, Any]) -> list[Any]:
    """The full model, then each reducer at each ratio; "auto" becomes the reducer it stands for."""
    from tokencomp.evaluation.settings import grid
    from tokencomp.patching import DEFAULT_REDUCER

    resolved = [DEFAULT_REDUCER if name == "auto" else name for name in chosen]
    return grid(dict.fromkeys(resolved), at, **options)
