"""Cells that repeat earlier pictures of a request: they are found in the processor, by pixels.

The number of placeholders must be known before the vision tower runs, so that the plan of an item
lists the cells that are kept (`ItemPlan.cells`). With `delta` they depend on the pictures that came
before in the request. The hash of an item therefore contains the hashes of these, and what a cache
holds under it was compared with the same pictures.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from tokencomp.adapters.towers.base import Cells
from tokencomp.adapters.towers.packed import CHANNELS
from tokencomp.engine.tower.stage import chosen_cells
from tokencomp.errors import OptionError
from tokencomp.method import Method
from tokencomp.plan.plan import TowerStage
from tokencomp.reducers.base import Reducer
from tokencomp.tokens.signals import SEEN
from tokencomp.tokens.tokens import LastKept


def compares(spec: Method) -> bool:
    """Whether what is kept of an item depends on earlier items of the request."""
    return spec.repeats is not None and SEEN in spec.repeats.needs


@dataclass(frozen=True)
class Compared:
    """Options of a request with some items in caches.

    `items` are all of vLLM's items by modality; `cached` says which of them caches hold.
    """

    spec: Method
    items: Any
    cached: Mapping[str, Sequence[bool]]
    hashes: Mapping[str, Sequence[str]]

    def earlier(self, modality: str) -> str | None:
        """Hash of the last of the items before the new ones; None if new ones are among them."""
        cached = self.cached[modality]
        first = [*cached, False].index(False)
        return None if not first or any(cached[first:]) else self.hashes[modality][first - 1]

    def check(self, modalities: Sequence[str]) -> Compared:
        """Return this; raise `OptionError` if an item came without pixels, as a name in a cache."""
        for modality in modalities:
            items = self.items.get(modality, ())
            if any(items[i] is None for i in range(len(items))):
                raise OptionError(
                    f"reducer {self.spec.built_reducer.name!r} compares pixels, and an item of "
                    f"modality {modality} came by its uuid without any. Send its pixels."
                )
        return self


class KeptPixels:
    """What was kept last of the pictures of requests, by the hash of the last one: `most` bytes.

    A request that continues such pictures is compared with it without preparing them again.
    """

    def __init__(self, most: int = 1 << 29) -> None:
        self._known: LRUCache[str, LastKept] = LRUCache(most, getsizeof=_size)

    def after(self, key: str | None) -> LastKept | None:
        """A copy of what is known of the pictures up to the item with that hash."""
        found = None if key is None else self._known.get(key)
        return None if found is None else dict(found)

    def keep(self, key: str, memory: LastKept) -> None:
        """Note what was kept of the pictures up to the item with that hash."""
        if _size(memory) <= self._known.maxsize:
            self._known[key] = memory


def _size(memory: LastKept) -> int:
    return sum(pixels.nbytes for pixels in memory.values())


def chained(hashes: Sequence[str]) -> list[str]:
    """Hashes of items that contain those of all items before them."""
    return [
        *itertools.accumulate(hashes, lambda a, b: hashlib.sha256(f"{a} {b}".encode()).hexdigest())
    ]


def item_cells(
    reducer: Reducer,
    modality: Any,
    pixels: Tensor,
    grids: Tensor,
    config: Any,
    std: Sequence[float],
    memory: LastKept,
) -> list[list[int]]:
    """Numbers of the cells that are kept of every item, ascending.

    `pixels` (patches, values) are those of the processor: scaled by `std` per channel, or whole
    numbers to 255; `grids` (items, 3) are (t, h, w) in patches. `memory` has what was kept last of
    earlier items, and afterwards also of these.
    """
    side, size = config.spatial_merge_size, config.patch_size
    parts = [(t, h // side, w // side) for t, h, w in grids.tolist()]
    members = torch.arange(len(pixels)).view(-1, side * side)
    patches = pixels.view(len(pixels), CHANNELS, -1, size, size)
    levels = 1 / (255 * torch.tensor(std)) if pixels.is_floating_point() else torch.ones(CHANNELS)
    cells = Cells(patches, members, [[grid] for grid in parts], modality)
    stage = TowerStage(0, 1.0, reducer)
    rows = chosen_cells(cells, stage, None, levels, [memory] * len(parts)).tolist()
    found: list[list[int]] = []
    first = 0
    for length in map(math.prod, parts):
        found.append([row - first for row in rows if first <= row < first + length])
        first += length
    return found
