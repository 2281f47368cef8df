"""Files that survive a kill: atomic writes, JSON, JSON Lines, and the check of a run's identity."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError


def replace_file(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary file, then rename it to `path`.

    A reader sees the old file or the new one, never a part. If `write` fails, nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write indented JSON atomically; values that JSON does not know are written as text."""
    return write_text(path, json.dumps(finite(value), indent=2, default=str) + "\n")


def finite(value: Any) -> Any:
    """The value with None for NaN and infinity, in dicts and lists as well: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line atomically."""
    return write_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


@contextmanager
def writing(path: Path, option: str = "-o/--output") -> Iterator[None]:
    """Turn a failure to write `path`, or to make its folder, into an `OptionError`.

    The message names the `option` that gives the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error}. Give another {option}.") from error


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Turn a failure to add to the results in `folder` into an `OptionError`."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"cannot write to {folder}: {error}. Finished answers stay there: make room or permit "
            "writing, and run the same command again."
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, not a {type(value).__name__}")
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{path} is damaged ({error}). Remove {path.parent}, or give another folder."
        ) from error
    return value


def plain(value: Any) -> Any:
    """The value after a round trip through JSON: tuples become lists, unknown types text."""
    return json.loads(json.dumps(value, default=str))


def check_identity(
    place: Path | str, stored: Mapping[str, Any], identity: Mapping[str, Any], fix: str = ""
) -> None:
    """Refuse to mix the results of two different runs: the message names every key that differs.

    `stored` is what the results in `place` depend on, `identity` what those of this run do.
    """
    old, new = plain(stored), plain(identity)
    changed = [k for k in {**new, **old} if old.get(k) != new.get(k)]
    if changed:
        pairs = ", ".join(
            f"{k}: {_short(old.get(k))} there, {_short(new.get(k))} now" for k in changed
        )
        raise OptionError(
            f"{place} holds a run that differs in {pairs}. "
            + (fix or "Give another --output, or remove it.")
        )


def _short(value: Any) -> str:
    """The value for a message; fingerprints and configurations are cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
