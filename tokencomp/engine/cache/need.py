"""What a compressed cache and its patch know of each other."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakSet


class PatchNeed:
    """Held by the layers of a cache that a decoder without hooks would read wrongly.

    Copies of a cache share it, and a cache that is loaded from a file has one of its own. As long
    as one is held, patches install their hooks also where they compress nothing.

    Attributes
    ----------
    lost : bool
        Whether the patch of some such cache may be gone.
    """

    _held: ClassVar[WeakSet[PatchNeed]] = WeakSet()
    lost: ClassVar[bool] = False

    def __init__(self) -> None:
        self._held.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchNeed:
        return self

    def __reduce__(self) -> Any:
        return PatchNeed, ()

    @classmethod
    def is_held(cls) -> bool:
        """Whether there is such a cache, of any model: caches may pass from one to another."""
        return bool(cls._held)


class InForce:
    """Whether the patch under which a cache was written is still there; copies of a cache share it.

    Attributes
    ----------
    compact
        Whether positions count the kept tokens only.
    active
        Whether the hooks of the patch are installed.
    """

    def __init__(self, compact: bool, loaded: bool = False) -> None:
        self.compact, self.active = compact, False
        if loaded:
            PatchNeed.lost = True

    def __deepcopy__(self, memo: dict[int, Any]) -> InForce:
        return self

    def __reduce__(self) -> Any:  # a cache that is loaded from a file has lost its patch
        return InForce, (self.compact, True)
