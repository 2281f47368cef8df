"""The section about teacher forcing, and about reading few rows of a full cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.long.forced import READERS
from benchmarks.long.settings import KINDS, RATIOS, method_of
from benchmarks.long.stored import unpack
from benchmarks.publishing import table
from tokencomp.evaluation.metrics import difference
from tokencomp.evaluation.settings import FULL

TOKENS = ((1, 8), (9, 24), (25, 48), (49, 96), (97, 400))
"""Places of tokens in an answer."""


def kept_facts(agrees: Sequence[int], facts: Sequence[int]) -> list[int]:
    """For every fact of an answer: whether all of its tokens agree, the end left out."""
    return [
        int(all(a for a, g in zip(agrees, facts, strict=True) if g == fact))
        for fact in sorted({g for g in facts if g >= 0})
    ]


def section(forced: dict[str, Any]) -> str:
    """The section, in Markdown."""
    held = unpack(forced["packed"])
    parts = [HEAD]
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}**, agreement by place of the token, ratio 0.75:\n"]
        parts += [_by_token(held[kind]), ""]
    parts += [ROOM]
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}** ({len(held[kind]['facts'])} answers)\n"]
        parts += [_room(held[kind]), ""]
    return "\n".join([*parts, _meaning(held), ""])


def _meaning(held: dict[str, Any]) -> str:
    """What the tables say of room above the default, at the largest ratio."""
    ratio, found = RATIOS[-1], {}
    for kind in KINDS:
        facts, readers = held[kind]["facts"], held[kind]["readers"]
        default = held[kind]["settings"][f"auto-{ratio}"]
        every = (default, readers[f"fact {ratio}"], readers[f"question {ratio}"])
        found[kind] = [f"{np.mean(_shares(one, facts)):.1%}" for one in every]
    return MEANING.format(ratio=ratio, **found)


def _by_token(held: dict[str, Any]) -> str:
    lines = []
    for label, agrees in held["settings"].items():
        if label == FULL or "0.75" not in label:
            continue
        cells = []
        for first, last in TOKENS:
            some = [a for one in agrees for a in one[first - 1 : last]]
            cells.append(f"{np.mean(some):.1%}" if some else "–")
        lines.append([method_of(label), *cells])
    lines.sort(key=lambda line: line[1:], reverse=True)
    some = next(iter(held["settings"].values()))
    counts = [str(sum(len(one[first - 1 : last]) for one in some)) for first, last in TOKENS]
    lines.insert(0, ["tokens", *counts])
    names = [f"{a} to {b}" if b < 400 else f"{a} and more" for a, b in TOKENS]
    return table(["method", *names], lines)


def _shares(agrees: Sequence[Sequence[int]], facts: Sequence[Sequence[int]]) -> list[float]:
    """Share of facts kept, per item."""
    return [float(np.mean(kept_facts(a, f))) for a, f in zip(agrees, facts, strict=True)]


def _room(held: dict[str, Any]) -> str:
    """Facts kept under teacher forcing: of settings, and of readers of the full cache."""
    facts = held["facts"]
    lines = []
    names = dict.fromkeys(method_of(label) for label in held["settings"] if label != FULL)
    for name in names:
        cells = []
        for ratio in RATIOS:
            label = next(
                k for k in held["settings"] if method_of(k) == name and str(ratio) in k.split("-")
            )
            cells.append(f"{np.mean(_shares(held['settings'][label], facts)):.1%}")
        lines.append([name, *cells])
    lines.sort(key=lambda line: [float(c[:-1]) for c in line[1:]], reverse=True)
    for reader in READERS:
        cells = [
            f"{np.mean(_shares(held['readers'][f'{reader} {ratio}'], facts)):.1%}"
            for ratio in RATIOS
        ]
        lines.append([f"*full cache, rows by {reader}*", *cells])
    gaps = []
    for ratio in RATIOS:
        again, once = (_shares(held["readers"][f"{r} {ratio}"], facts) for r in ("fact", "answer"))
        gaps.append(str(difference(again, once)))
    lines.append(["*rows by fact minus by answer, points*", *gaps])
    return table(["facts that agree", *(f"ratio {r}" for r in RATIOS)], lines)


MEANING = """At ratio {ratio}, rows chosen again for every fact keep {images[1]} of the facts on
images, the default {images[0]}, and rows chosen once by the question {images[2]}. There a method
that keeps all rows and reads few of them has room, if it knows which. On clips they keep
{clips[1]}, the default {clips[0]}: next to merging there is little room.
"""
HEAD = """## Token by token

Teacher forcing: a setting continues the answer of the full model, so what it gets wrong is not the
consequence of an earlier mistake.
"""
ROOM = """## Choosing again for every fact

Would it help to keep all rows and to read few of them per step? Facts all of whose tokens agree,
under teacher forcing. In italics: the prompt is read in full, and each token of the answer sees
1 − ratio of the visual tokens, those with the largest attention of the full run (mean over layers
and heads), chosen once for the whole answer by the last token of the question or by the answer
itself, or again for every fact or every token. These are masked runs that know the answer; they
save nothing, and bound what choosing again can bring.
"""
