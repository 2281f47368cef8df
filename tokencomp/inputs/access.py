"""Files without read permission."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokencomp.errors import MediaError


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn a missing permission into a `MediaError` that names it."""
    try:
        yield
    except PermissionError as error:
        raise no_permission(path) from error


def no_permission(path: str | Path) -> MediaError:
    """The error about a file without permission."""
    return MediaError(
        f"{path}: no permission to read it. Change the permissions of the file and its folders, "
        "e.g. chmod +rX."
    )


def missing(path: str | Path, what: str) -> MediaError:
    """The error for a path that does not exist; a `Path` merges the slashes of an URL."""
    if address := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(path)):
        name = "://".join(address.groups())
        return MediaError(f"{name}: URLs are not read. Download the file, and give its path.")
    return MediaError(f"{path}: no such file. Give the path of a local {what}.")


def exists(path: Path) -> bool:
    """Whether the file or folder exists; raises `PermissionError`, as not every Python does."""
    try:
        path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False
    return True


def check_readable(path: Path) -> None:
    """Open a file or folder that exists, and close it. Raises `PermissionError`."""
    if path.is_dir():
        next(path.iterdir(), None)
    else:
        path.open("rb").close()
