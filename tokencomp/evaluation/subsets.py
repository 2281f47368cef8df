"""The `random` baseline of an evaluation: every question gets a subset of its own."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tokencomp.context import Reduction, VisualTokens
from tokencomp.reducers.random import Random


@dataclass(frozen=True)
class Subsets(Random):
    """`random` that draws anew for every span: its k-th call is seeded by seed, `key` and k.

    The reducer itself gives all spans of a grid the same subset, so that batches and homes agree.
    Asked that way, all questions share the luck of one subset, which no interval over questions
    shows.

    Attributes
    ----------
    key
        Names the prompts of one call, so that asking again draws the same.
    """

    key: str = ""
    _calls: Iterator[int] = field(
        default_factory=itertools.count, init=False, repr=False, compare=False
    )

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        seed = zlib.crc32(f"{self.seed}/{self.key}/{next(self._calls)}".encode())
        return Random(seed).reduce(tokens, keep)

    def options(self) -> dict[str, Any]:
        return {"seed": self.seed, "key": self.key}


def per_question(request: dict[str, Any], key: str) -> dict[str, Any]:
    """A request for `tokencomp.patch`; `random` becomes `Subsets` of `key`, others stay."""
    if request.get("reducer") != "random":
        return request
    options = {k: v for k, v in request.items() if k not in ("ratio", "reducer")}
    return {"ratio": request["ratio"], "reducer": Subsets(**options, key=key)}
