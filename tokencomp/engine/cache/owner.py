"""The patch that a compressed cache belongs to."""

from __future__ import annotations

from typing import Any


class CacheOwner:
    """Says whether the patch that compressed a cache is installed; copies of the cache share it.

    Attributes
    ----------
    compact
        Whether positions count the kept tokens only.
    active
        Whether the hooks of the patch are installed.
    """

    def __init__(self, compact: bool) -> None:
        self.compact, self.active = compact, False

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheOwner:
        return self

    def __reduce__(self) -> Any:  # a cache that is loaded from a file has no patch
        return CacheOwner, (self.compact,)
