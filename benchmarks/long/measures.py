"""What an answer keeps: facts by setting, by place in the answer and by its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.long.settings import KINDS, RATIOS, method_of
from benchmarks.long.stored import Answers
from tokencomp.evaluation.metrics import Retention, retention
from tokencomp.evaluation.settings import FULL, RANDOM
from tokencomp.zoo.shapesqa.facts import Comparison, compare, read
from tokencomp.zoo.shapesqa.long_scenes import LongItem, item

Where = Callable[[int, int], bool]
"""Which facts count, by their place in the answer, from 1, and the number of its facts."""
PLACES = ((1, 1), (2, 2), (3, 4), (5, 6), (7, 9), (10, 40))
"""First and last place of a fact in its answer."""
LENGTHS = ((1, 3), (4, 6), (7, 9), (10, 40))
"""Facts of an answer."""


def item_of(name: str) -> LongItem:
    """The item of an id."""
    split, family, index = name.split("-")
    return item(split, family, int(index))


def methods_of(answers: Answers, kind: str) -> dict[str, dict[float, list[str]]]:
    """By method and ratio: the labels of its settings, which are several for `random`."""
    found: dict[str, dict[float, list[str]]] = {}
    for label in answers.texts[kind]:
        if label == FULL:
            continue
        ratio = next(r for r in RATIOS if str(r) in label.split("-"))
        method = RANDOM if label.startswith(f"{RANDOM}-") else method_of(label)
        found.setdefault(method, {}).setdefault(ratio, []).append(label)
    return found


@dataclass(frozen=True)
class Group:
    """The items of some families with the answers of all settings."""

    items: tuple[LongItem, ...]
    texts: dict[str, list[str]]

    @classmethod
    def of(cls, answers: Answers, kind: str, families: Sequence[str] = ()) -> Group:
        items = [item_of(name) for name in answers.ids[kind]]
        wanted = [i for i, one in enumerate(items) if one.family in (families or KINDS[kind])]
        chosen = {label: [some[i] for i in wanted] for label, some in answers.texts[kind].items()}
        return cls(tuple(items[i] for i in wanted), chosen)

    @cached_property
    def _compared(self) -> dict[str, list[Comparison]]:
        return {}

    def compared(self, label: str) -> list[Comparison]:
        """Answers of a setting against the facts of the scenes."""
        if label not in self._compared:
            self._compared[label] = [
                compare(one.family, one.facts, read(one.family, text))
                for one, text in zip(self.items, self.texts[label], strict=True)
            ]
        return self._compared[label]

    def kept(self, labels: Sequence[str], where: Where) -> np.ndarray:
        """Share of its facts that every item keeps, mean over `labels`, float (items,).

        Items without a fact at `where` are left out.
        """
        rows = []
        for label in labels:
            held = [
                [k for p, k in enumerate(one.kept, 1) if where(p, len(one.kept))]
                for one in self.compared(label)
            ]
            rows.append([float(np.mean(some)) for some in held if some])
        return np.mean(rows, 0)

    def total(self, where: Where) -> int:
        """Number of facts."""
        return sum(
            where(p, len(one.facts)) for one in self.items for p in range(1, len(one.facts) + 1)
        )

    def retention(
        self, labels: Sequence[str], where: Where = lambda place, facts: True
    ) -> Retention:
        """Mean share of facts, divided by the full model's, with a paired interval over items."""
        full = self.kept([FULL], where)
        return retention(self.kept(labels, where), full)

    def shares(self, labels: Sequence[str]) -> dict[str, float]:
        """Shares of all facts that are right, changed, left out and invented; pairs in order."""
        found = [one for label in labels for one in self.compared(label)]
        facts = sum(len(one.kept) for one in found)
        pairs = sum(len(one.ordered) for one in found)
        return {
            "right": sum(sum(one.kept) for one in found) / facts,
            "changed": sum(sum(one.changed) for one in found) / facts,
            "left_out": sum(sum(one.left_out) for one in found) / facts,
            "invented": sum(one.invented for one in found) / facts,
            "ordered": sum(sum(one.ordered) for one in found) / max(1, pairs),
        }


def by_place(first: int, last: int) -> Where:
    """Facts at these places of their answer."""
    return lambda place, facts: first <= place <= last


def by_length(first: int, last: int) -> Where:
    """Facts of answers of so many facts."""
    return lambda place, facts: first <= facts <= last
