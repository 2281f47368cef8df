"""The `random` baseline of an evaluation: every question gets a subset of its own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokencomp.evaluation.settings import RANDOM
from tokencomp.reducers.random import Random
from tokencomp.tokens import Reduction, VisualTokens


@dataclass(frozen=True)
class Subsets(Random):
    """`random`, seeded by seed, name of the sample, and number of the span in it.

    The reducer itself gives all spans of a grid the same subset, so that batches and homes agree.
    Asked that way, all questions share the luck of one subset, which no interval over questions
    shows.

    Attributes
    ----------
    names
        Of the samples of the batch, in order. What a sample gets depends on its own alone.
    """

    names: tuple[str, ...] = ()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        sample, span = tokens.place
        seed = zlib.crc32(f"{self.seed}/{self.names[sample]}/{span}".encode())
        return Random(seed).reduce(tokens, keep)


def per_question(request: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A request for `tokencomp.patch`; `random` becomes `Subsets` of the samples, others stay."""
    if request.get("reducer") != RANDOM:
        return request
    made = Subsets(request.get("seed", 0), tuple(names))
    return {**{k: v for k, v in request.items() if k != "seed"}, "reducer": made}
