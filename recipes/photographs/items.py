"""Questions of StampsQA as items of a split: the same arguments always give the same item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from recipes.photographs.questions import FAMILIES
from recipes.photographs.scenes import Library, StampScene, render, sample
from recipes.tiny.letters import letters_prompt
from tokencomp.inputs.questions import Deferred
from tokencomp.zoo.shapesqa.items import QueryFields, stream
from tokencomp.zoo.shapesqa.prompt_forms import letter
from tokencomp.zoo.shapesqa.questions import Question

LETTERS = "letters"  # family of questions with lettered options


@dataclass(frozen=True)
class StampItem(QueryFields):
    """One question with its scene; pixels are composed when they are needed."""

    id: str
    scene: StampScene
    query: Question
    library: Library

    def image(self) -> Image.Image:
        return Image.fromarray(render(self.scene, self.library))

    def example(self) -> Deferred:
        """The question in words, for `tokencomp.evaluation`."""
        text, answer = self.query.text, self.query.answer
        return Deferred(self.id, text, answer, (), self.family, self._media)

    def lettered(self, name: str) -> Deferred:
        """The question with lettered options, under an id of its own."""
        text, answer = letters_prompt(self.query), letter(self.query)
        return Deferred(name, text, answer, (), LETTERS, self._media)

    def _media(self) -> tuple[Image.Image]:
        return (self.image(),)


def item(library: Library, split: str, family: str, index: int) -> StampItem:
    """Item ``index`` of a family; splits have disjoint seeds and backgrounds."""
    for attempt in range(1000):
        rng = stream(split, "stamps", family, index, attempt)
        scene = sample(rng, library, split)
        query = FAMILIES[family](scene, library.names, rng)
        if query is not None:
            return StampItem(f"{split}-{family}-{index:05d}", scene, query, library)
    raise RuntimeError(f"no scene allows a {family!r} question.")


def items(
    library: Library, split: str, per_family: int, families: tuple[str, ...] = tuple(FAMILIES)
) -> Iterator[StampItem]:
    """``per_family`` items of each family, family by family."""
    for family in families:
        for index in range(per_family):
            yield item(library, split, family, index)
