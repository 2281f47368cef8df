"""Which caches are still there that only a patched model reads right."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakSet


class PatchNeed:
    """Held by the layers of a cache that a decoder without hooks would read wrongly.

    Copies of a cache share it, and a cache that is loaded from a file has one of its own. As long
    as one is held, patches install their hooks also where they compress nothing.
    """

    _held: ClassVar[WeakSet[PatchNeed]] = WeakSet()

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
