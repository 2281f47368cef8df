"""The sections about other pictures and a second family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from benchmarks.long.confirm import CONFIRMATIONS, KIND
from benchmarks.long.measures import Group, methods_of
from benchmarks.long.settings import DEFAULT, MIDDLE, RATIOS, group_name
from benchmarks.long.stored import Answers
from benchmarks.publishing import table
from tokencomp.evaluation.metrics import Difference, difference
from tokencomp.evaluation.settings import FULL

Labels = Mapping[str, Mapping[float, list[str]]]
FIRST = 3
"""Methods whose order is compared."""


def section(name: str, first: Answers, here: Answers) -> str:
    """One confirmation, in Markdown: shares of facts, and differences of the first methods."""
    families = CONFIRMATIONS[name].families
    group, labels = Group.of(here, KIND), methods_of(here, KIND)
    right = ", ".join(
        f"{family} {Group.of(here, KIND, (family,)).shares([FULL])['right']:.1%}"
        for family in families
    )
    head = _HEADS[name].format(
        items=len(group.items), facts=group.total(lambda place, facts: True), right=right
    )
    ranked = _ranked(group, labels)
    lines = []
    for method in ranked:
        found = [group.retention(labels[method][ratio]) for ratio in RATIOS]
        cells = [f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]" for one in found]
        lines.append([f"**{method}**" if method == DEFAULT else method, *cells])
    names = ["method", *(f"ratio {ratio}" for ratio in RATIOS)]
    before = Group.of(first, KIND, families)
    return "\n".join(
        [head, table(names, lines), "", *_order(before, methods_of(first, KIND), group, labels), ""]
    )


def _ranked(group: Group, labels: Labels) -> list[str]:
    """Methods, the best at `MIDDLE` first."""
    return sorted(labels, key=lambda method: -group.retention(labels[method][MIDDLE]).value)


def first_methods(group: Group, labels: Labels, asked: Labels) -> list[str]:
    """Methods that were asked in both places, the best first; one of several with equal answers.

    Of a reducer and the default that stands for it, the default.
    """
    chosen: list[str] = []
    known: list[list[str]] = []
    order = [m for m in _ranked(group, labels) if m in asked and group_name(m) != "baseline"]
    for method in sorted(order, key=lambda m: m != DEFAULT):
        texts = [text for ratio in RATIOS for text in group.texts[labels[method][ratio][0]]]
        if texts not in known:
            chosen.append(method)
            known.append(texts)
    return sorted(chosen, key=order.index)


def _gap(group: Group, labels: Labels, pair: Sequence[str], ratio: float) -> Difference:
    """Mean share of facts with the first method minus that with the second, paired."""
    a, b = (group.kept(labels[m][ratio], lambda place, facts: True) for m in pair)
    return difference(a, b)


def _order(before: Group, known: Labels, group: Group, labels: Labels) -> list[str]:
    """Differences of the first methods in both places, and whether their signs agree.

    The default against the next method is shown as well, and has no part in the verdict.
    """
    lines, same, opposed = [], 0, 0
    ranked = first_methods(before, known, labels)
    pairs = [*combinations(ranked[:FIRST], 2)]
    for pair in [*pairs, *((DEFAULT, method) for method in ranked[FIRST : FIRST + 1])]:
        for ratio in RATIOS:
            found = [_gap(before, known, pair, ratio), _gap(group, labels, pair, ratio)]
            signs = [(one.low > 0) - (one.high < 0) for one in found]
            if pair in pairs:
                same += signs[0] * signs[1] > 0
                opposed += signs[0] * signs[1] < 0
            cells = [
                f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in found
            ]
            lines.append([" − ".join(pair), str(ratio), *cells])
    verdict = _OPPOSED if opposed else _SAME if same else _OPEN
    total = len(pairs) * len(RATIOS)
    return [
        _ORDER,
        table(["pair, points of facts", "ratio", "above", "here"], lines),
        "",
        verdict.format(total=total, opposed=opposed, same=same, rest=total - same - opposed),
    ]


_HEADS = {
    "renderer": """## Another renderer

`python -m benchmarks.long confirm renderer`: the same model and scenes, drawn in another way
([how](redrawn.py)): paper instead of textures, shaded and turned objects with outlines and shadows,
other shades, other fonts, centred lines, objects near the middle of their place. The model was not
trained on such pictures, and nothing was adjusted to its answers. {items} test questions with
{facts} facts; the full model has these shares right:
{right}. Cells as above.
""",
    "family": """## A second family

`python -m benchmarks.long confirm family --model FOLDER`: tiny-gemma3, trained further by `python
-m recipes.long.build --model tiny-gemma3` to describe and count. A picture has 64 tokens, which see
each other; ten of twelve layers look back over 48 tokens, so that two layers read most of the
picture for most of an answer. All pictures become 224 × 224 px, so `downscale` saves nothing. The
weights are not stored. {items} test questions about pictures of 224 px with three to six objects,
and {facts} facts; the full model has these shares right:
{right}. Cells as above.
""",
}
_ORDER = """\
Are the first three methods in the same order? Paired differences with 95 % intervals; "above" are
those of the first table of this page, for the families of questions asked here.
"""
_SAME = """\
**The order is the same within intervals**: of the {total} differences between the three, {same}
have the same sign as above with both intervals apart from 0, none has another, {rest} are open."""
_OPPOSED = """\
**The order is not the same**: of the {total} differences between the three, {opposed} have another
sign than above with both intervals apart from 0, {same} have the same, {rest} are open."""
_OPEN = """\
**The order is the same within intervals, which tell no two of the three apart**: all {rest}
differences between them are open, here or above."""
