"""Right answers made of facts: descriptions, lists, transcriptions.

A fact is found where its words occur in an answer, one after the other. Example, not `ordered`:

    facts     "red cup", "large red cup", ("three forks", "3 forks"), "knife"
    answer    "1. A large red cup. 2. 3 forks; two spoons."
    kept      large red cup, 3 forks     ("red cup" has no words left for itself)
    invented  1: "two spoons"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokencomp.inputs.words import plain_words

Span = tuple[int, int]
"""Words of an answer: the first, and the one after the last."""
STATEMENTS = re.compile(r"[;\n]|[.!?](?=\s|$)")
MARKER = re.compile(r"(?:^|(?<=[.;!?]))\s*(?:[-*•]|\(?\d+[.)])(?=\s)", re.MULTILINE)
"""The number or dot before an item of a list."""


@dataclass(frozen=True)
class FactsFound:
    """Facts of a question in an answer.

    Attributes
    ----------
    kept : tuple of bool
        For every fact: whether the answer has it.
    invented : int
        Statements of the answer that hold no words of any fact.
    """

    kept: tuple[bool, ...]
    invented: int


@dataclass(frozen=True)
class Facts:
    """The facts of a right answer.

    Attributes
    ----------
    wordings
        Per fact, in the order of the answer: the texts that are right, one or more.
    ordered
        Whether facts count only in this order: the largest number of them that do.
    """

    wordings: tuple[tuple[str, ...], ...]
    ordered: bool = False

    def __str__(self) -> str:
        order = " (in this order)" if self.ordered else ""
        return "; ".join(" / ".join(texts) for texts in self.wordings) + order

    @property
    def answer(self) -> str:
        """An answer that says all of them."""
        return "; ".join(texts[0] for texts in self.wordings)

    def found(self, answer: str) -> FactsFound:
        """What an answer says of the facts.

        Case and punctuation do not count. A word of the answer belongs to one fact, to a longer one
        first; a fact that is listed twice has to be said twice. Statements end at line breaks,
        semicolons, and full stops, question and exclamation marks before a space.
        """
        unmarked = MARKER.sub("", answer)  # without numbers and dots before the items of a list
        statements = [plain_words(part).split() for part in STATEMENTS.split(unmarked)]
        words = [word for part in statements for word in part]
        spots = [
            [spot for text in texts for spot in _spots(plain_words(text).split(), words)]
            for texts in self.wordings
        ]
        kept = _in_order(spots) if self.ordered else _in_any_order(spots)
        named = {k for spans in spots for start, stop in spans for k in range(start, stop)}
        invented, first = 0, 0
        for part in statements:
            places = range(first, first + len(part))
            invented += bool(part) and named.isdisjoint(places)
            first = places.stop
        return FactsFound(tuple(k in kept for k in range(len(spots))), invented)


def _spots(fact: Sequence[str], words: Sequence[str]) -> list[Span]:
    """Where the words of a fact occur."""
    n = len(fact)
    return [(k, k + n) for k in range(len(words) - n + 1) if list(words[k : k + n]) == [*fact]]


def _in_any_order(spots: Sequence[Sequence[Span]]) -> set[int]:
    """Facts whose words are in the text; longer ones choose first."""
    taken: set[int] = set()
    kept = set()
    longest = [max((stop - start for start, stop in spans), default=0) for spans in spots]
    for fact in sorted(range(len(spots)), key=lambda k: -longest[k]):
        for start, stop in spots[fact]:
            if taken.isdisjoint(range(start, stop)):
                taken.update(range(start, stop))
                kept.add(fact)
                break
    return kept


def _in_order(spots: Sequence[Sequence[Span]]) -> set[int]:
    """The largest number of facts whose words follow one another in the order of the facts."""
    # best[n]: n facts in order whose last word comes earliest, and the word after it.
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for fact, spans in enumerate(spots):
        for n in reversed(range(len(best))):
            end, chosen = best[n]
            stops = [stop for start, stop in spans if start >= end]
            if not stops:
                continue
            longer = (min(stops), (*chosen, fact))
            if n + 1 == len(best):
                best.append(longer)
            elif longer[0] < best[n + 1][0]:
                best[n + 1] = longer
    return set(best[-1][1])
