"""Calling the console script inside this process."""

from __future__ import annotations

from tokencomp.cli import main


def run(*args: object) -> int:
    """Exit code of `tokencomp ARGS`."""
    try:
        main([str(a) for a in args])
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0
