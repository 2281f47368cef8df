"""Processes of a server that was started as a session of its own (Linux)."""

from __future__ import annotations

from pathlib import Path


def session(leader: int) -> list[Path]:
    """Return the folders below /proc of the processes of a session that have not ended."""
    folders = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process has ended
            continue
        if int(number) == leader and state != "Z":
            folders.append(folder)
    return folders
