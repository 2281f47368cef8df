"""What `tokencomp doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`ok` is None for things that are worth knowing but not broken."""

    name: str
    ok: bool | None
    detail: str
