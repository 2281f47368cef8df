"""Long answers made of facts: how they are written, read back and compared.

A fact has a key, under which it can occur once in an answer, and a value. An answer is read back
whatever a model has written: a clause in no known form is a fact that no picture has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokencomp.zoo.shapesqa.scenes import COLORS, DIRECTIONS, SHAPES

ROWS = ("top", "upper", "lower", "bottom")
SIDES = ("left", "center", "right")
PLACES = tuple(f"{row} {side}" for row in ROWS for side in SIDES)
"""In reading order."""
SIZES = ("small", "large")
VERBS = (*(f"moves {direction}" for direction in DIRECTIONS), "flashes", "stays")
SUM = "sum"


@dataclass(frozen=True)
class Fact:
    """One fact of an answer.

    ======== ============ =======================================
    family   key          value
    ======== ============ =======================================
    describe "top left"   "small red cross"
    count    "top left"   "small red cross"; `SUM`: "2"
    follow   "3"          "top left: the red circle moves up"
    compare  "top left"   "the red cross is gone"
    read     "0"          "cat": the first word
    ======== ============ =======================================
    """

    key: str
    value: str


@dataclass(frozen=True)
class Comparison:
    """What an answer says of the facts of a reference.

    Attributes
    ----------
    kept : tuple of bool
        For every fact of the reference, in its order: whether the answer has it.
    changed : tuple of bool
        The same: whether the answer has its key with another value.
    invented : int
        Facts of the answer whose key the reference does not have, or has been used before.
    ordered : tuple of bool
        For every two neighbours among the kept facts, in the order of the reference: whether the
        answer has them in this order.
    """

    kept: tuple[bool, ...]
    changed: tuple[bool, ...]
    invented: int
    ordered: tuple[bool, ...]

    @property
    def left_out(self) -> tuple[bool, ...]:
        """For every fact of the reference: whether its key is missing in the answer."""
        return tuple(not (a or b) for a, b in zip(self.kept, self.changed, strict=True))


def write(family: str, facts: Sequence[Fact]) -> str:
    """The answer of a family that says these facts."""
    return _WRITERS[family](facts)


def read(family: str, answer: str) -> list[Fact]:
    """The facts that an answer says, in its order; whatever it is, nothing is raised."""
    return _READERS[family](answer.strip())


def compare(family: str, reference: Sequence[Fact], said: Sequence[Fact]) -> Comparison:
    """Facts of an answer against those of the reference.

    Keys decide which facts belong together. Words that are read have none but their number, so an
    alignment of fewest edits pairs them.
    """
    if family == "read":
        return _compare_words([f.value for f in reference], [f.value for f in said])
    first: dict[str, int] = {}
    for at, fact in enumerate(said):
        first.setdefault(fact.key, at)
    keys = {fact.key for fact in reference}
    kept = tuple(f.key in first and said[first[f.key]].value == f.value for f in reference)
    changed = tuple(f.key in first and not k for f, k in zip(reference, kept, strict=True))
    invented = len(said) - sum(key in keys for key in first)
    at = [first[f.key] for f, k in zip(reference, kept, strict=True) if k]
    ordered = tuple(a < b for a, b in pairwise(at))
    return Comparison(kept, changed, invented, ordered)


def _compare_words(reference: list[str], said: list[str]) -> Comparison:
    """Words in order, by an alignment of fewest edits."""
    kept, changed = [False] * len(reference), [False] * len(reference)
    invented = 0
    for i, j in alignment(reference, said):
        if i is None:
            invented += 1
        elif j is not None:
            kept[i] = reference[i] == said[j]
            changed[i] = not kept[i]
    pairs = max(0, sum(kept) - 1)
    return Comparison(tuple(kept), tuple(changed), invented, (True,) * pairs)


def alignment(a: Sequence[str], b: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Pairs of indices of an alignment with the fewest insertions, deletions and substitutions.

    Of several the one with the most equal pairs is taken. None stands for a gap.
    """
    # cost[i][j] of the first i and j: edits, then equal pairs, negated.
    cost = [[(0, 0)] * (len(b) + 1) for _ in range(len(a) + 1)]
    step = [[(0, 0)] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            ways = []
            if i and j:
                edits, equal = cost[i - 1][j - 1]
                same = a[i - 1] == b[j - 1]
                ways.append(((edits + (not same), equal - same), (1, 1)))
            if i:
                ways.append(((cost[i - 1][j][0] + 1, cost[i - 1][j][1]), (1, 0)))
            if j:
                ways.append(((cost[i][j - 1][0] + 1, cost[i][j - 1][1]), (0, 1)))
            if ways:
                cost[i][j], step[i][j] = min(ways)
    out: list[tuple[int | None, int | None]] = []
    i, j = len(a), len(b)
    while i or j:
        di, dj = step[i][j]
        i, j = i - di, j - dj
        out.append((i if di else None, j if dj else None))
    return out[::-1]


def _sentence(clauses: Sequence[str]) -> str:
    return "; ".join(clauses) + "."


def _describe(facts: Sequence[Fact]) -> str:
    return _sentence([f"{f.key}: a {f.value}" for f in facts])


def _count(facts: Sequence[Fact]) -> str:
    steps = [f for f in facts if f.key != SUM]
    clauses = [f"{k}, {f.key}: a {f.value}" for k, f in enumerate(steps, 1)]
    return _sentence([*clauses, *(f"so {f.value}" for f in facts if f.key == SUM)])


def _follow(facts: Sequence[Fact]) -> str:
    return _sentence([f"{f.key} s, {f.value}" for f in facts])


def _compare(facts: Sequence[Fact]) -> str:
    return _sentence([f"{f.key}: {f.value}" for f in facts])


def _read(facts: Sequence[Fact]) -> str:
    return " ".join(f.value for f in facts)


def _one(words: Sequence[str]) -> str:
    return f"({'|'.join(words)})"


_PLACE = _one(PLACES)
_THING = f"{_one(COLORS)} {_one(SHAPES)}"
_OBJECT = f"({_one(SIZES)} {_THING})"
_CHANGE = f"(the {_THING} is (gone|new|now {_one(COLORS)}|now a {_one(SHAPES)}))"
_FORMS = {
    "describe": (re.compile(f"{_PLACE}: a {_OBJECT}"),),
    "count": (re.compile(f"\\d+, {_PLACE}: a {_OBJECT}"), re.compile("(so) (\\d+)")),
    "follow": (re.compile(f"(\\d+) s, ({_PLACE}: the {_THING} {_one(VERBS)})"),),
    "compare": (re.compile(f"{_PLACE}: {_CHANGE}"),),
}


def _clauses(family: str) -> Callable[[str], list[Fact]]:
    def parse(answer: str) -> list[Fact]:
        out = []
        for clause in filter(None, (part.strip() for part in answer.rstrip(".").split(";"))):
            found = next((m for form in _FORMS[family] if (m := form.fullmatch(clause))), None)
            if found is None:
                out.append(Fact(f"? {clause}", ""))
            else:
                out.append(Fact(SUM if found[1] == "so" else found[1], found[2]))
        return out

    return parse


def _words(answer: str) -> list[Fact]:
    return [Fact(str(k), word) for k, word in enumerate(answer.split())]


_WRITERS: dict[str, Callable[[Sequence[Fact]], str]] = {
    "describe": _describe,
    "count": _count,
    "follow": _follow,
    "compare": _compare,
    "read": _read,
}
_READERS: dict[str, Callable[[str], list[Fact]]] = {
    **{family: _clauses(family) for family in _FORMS},
    "read": _words,
}
