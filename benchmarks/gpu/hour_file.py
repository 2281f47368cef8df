"""The manifest of a first hour on a GPU, and its lines in the page of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from benchmarks import publishing
from benchmarks.gpu.result_file import FORMAT, Origin, Strict
from tokencomp.errors import OptionError

MANIFEST = "manifest.json"


class PartRun(Strict):
    """How one part ended."""

    name: str
    question: str
    status: Literal["done", "failed", "out of time", "left out"]
    seconds: float = Field(ge=0)
    minutes: float = Field(gt=0, description="Time limit.")
    note: str = Field(default="", max_length=2000)


class HourFile(Strict):
    """The manifest of one folder under `results/hour/`."""

    format: Literal[1] = FORMAT
    about: Origin
    rehearsal: bool
    parts: list[PartRun]


def read_hour(path: Path) -> HourFile:
    """A manifest, checked by its schema.

    Raises
    ------
    OptionError
        It does not fit the schema, or is that of a rehearsal, which measures nothing.
    """
    try:
        hour = HourFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError, ValueError) as error:
        raise OptionError(f"{path}: not the manifest of a first hour ({error}).") from error
    if hour.rehearsal:
        raise OptionError(f"{path}: a rehearsal measures nothing. Remove its folder.")
    return hour


def hours_page(hours: Sequence[tuple[str, HourFile]]) -> str:
    """Markdown of all first hours; each comes with the name of its folder."""
    lines = ["\n## The first hour on a GPU\n", "`python -m benchmarks.gpu.hour --model FOLDER`\n"]
    for name, hour in hours:
        about = hour.about
        gpus = ", ".join(about.hardware.get("gpus") or ["no GPU"])
        rows = [
            [part.question, f"[{part.name}](hour/{name}/{part.name})", part.status,
             f"{part.seconds / 60:.1f} of {part.minutes:g}"]
            for part in hour.parts
        ]  # fmt: skip
        head = ("question", "part", "status", "minutes")
        facts = f"{gpus}; {about.model}; commit {about.commit[:9]}; {about.date[:10]}."
        lines += [facts, "", publishing.table(head, rows), ""]
    return "\n".join(lines if hours else [*lines, "No GPU has run it yet.\n"])
