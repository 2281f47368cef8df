"""Checks of paths before libraries open them, which name the cause less clearly."""

from __future__ import annotations

import stat
from pathlib import Path

from tokencomp.errors import MediaError


def check_readable(path: Path, what: str) -> None:
    """Raise `MediaError` unless `path`, which should be a `what`, exists and can be read."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        elif stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait
            path.open("rb").close()
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise MediaError(
            f"{path}: {why}. Give the path of a local {what} that can be read; URLs are not."
        ) from error
