"""Questions about clips as items of a split: the same arguments always give the same item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recipes.sounds.questions import FAMILIES
from recipes.sounds.scenes import Clip, render, sample
from tokencomp.inputs.questions import Deferred
from tokencomp.zoo.shapesqa.items import QueryFields, stream
from tokencomp.zoo.shapesqa.questions import Question


@dataclass(frozen=True)
class SoundItem(QueryFields):
    """One question with its clip; samples are made when they are needed."""

    id: str
    clip: Clip
    query: Question

    def example(self) -> Deferred:
        """The question for `tokencomp.evaluation`."""
        return Deferred(self.id, self.question, self.answer, (), self.family, self._media)

    def _media(self) -> tuple[np.ndarray]:
        return (render(self.clip),)


def item(split: str, family: str, index: int) -> SoundItem:
    """Item `index` of a family; splits have disjoint seeds."""
    for attempt in range(1000):
        rng = stream(split, "sounds", family, index, attempt)
        clip = sample(rng)
        query = FAMILIES[family](clip, rng)
        if query is not None:
            return SoundItem(f"{split}-{family}-{index:05d}", clip, query)
    raise RuntimeError(f"no clip allows a {family!r} question.")


def items(split: str, per_family: int) -> Iterator[SoundItem]:
    """`per_family` items of each family, family by family."""
    for family in FAMILIES:
        for index in range(per_family):
            yield item(split, family, index)
