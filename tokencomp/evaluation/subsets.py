"""The `random` baseline of an evaluation: every question gets a subset of its own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from tokencomp.evaluation.settings import RANDOM, Setting
from tokencomp.reducers.random import Random
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import VisualTokens


@dataclass(frozen=True)
class Subsets(Random):
    """`random`, seeded by the seed, the name of the sample, and the number of the span in it.

    The reducer itself gives all spans of a grid the same subset. In an evaluation the luck of that
    one draw would affect every question alike, and would not show up in confidence intervals over
    questions.

    Attributes
    ----------
    names
        Names of the samples of the batch, in order. A subset depends on its own name alone.
    """

    names: tuple[str, ...] = ()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        sample, span = tokens.place
        seed = zlib.crc32(f"{self.seed}/{self.names[sample]}/{span}".encode())
        return Random(seed).reduce(tokens, keep)


def per_question(setting: Setting, names: Sequence[str]) -> Subsets | None:
    """The reducer that replaces `random` for the questions of a batch; None for other settings."""
    if setting.reducer != RANDOM or not setting.active:
        return None
    return Subsets(setting.options.get("seed", 0), tuple(names))
