"""The same questions to the model about other pictures, and to a model of another family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from benchmarks.long.answers import (
    DEFAULT,
    MIDDLE,
    RATIOS,
    Answers,
    Group,
    group_name,
    methods_of,
)
from benchmarks.publishing import table
from tokencomp.evaluation.metrics import Difference, difference
from tokencomp.evaluation.settings import FULL

KIND = "images"
FILES = {"renderer": "other-renderer.json", "family": "second-family.json"}
"""Stored answers, by what was asked again."""
FAMILIES = {"renderer": ("describe", "count", "read", "compare"), "family": ("describe", "count")}
Labels = Mapping[str, Mapping[float, list[str]]]
FIRST = 3
"""Methods whose order is compared."""


def section(name: str, first: Answers, here: Answers) -> str:
    """One confirmation, in Markdown: shares of facts, and differences of the first methods."""
    families = FAMILIES[name]
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


def short(name: str, here: Answers) -> str:
    """What the default keeps, in a sentence."""
    group, labels = Group.of(here, KIND), methods_of(here, KIND)[DEFAULT]
    kept = ", ".join(f"{100 * group.retention(labels[ratio]).value:.1f}" for ratio in RATIOS)
    return f"- **{_NAMES[name]}**: the default keeps {kept} % on images."


def _ranked(group: Group, labels: Labels) -> list[str]:
    """Methods, the best at `MIDDLE` first."""
    return sorted(labels, key=lambda method: -group.retention(labels[method][MIDDLE]).value)


def first_methods(group: Group, labels: Labels, asked: Labels) -> list[str]:
    """Methods that were asked in both places, the best first; one of several with equal answers.

    Of a reducer and the default that chooses it, the default.
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
    lines, signs = [], []
    ranked = first_methods(before, known, labels)
    pairs = [*combinations(ranked[:FIRST], 2)]
    for pair in [*pairs, *((DEFAULT, method) for method in ranked[FIRST : FIRST + 1])]:
        for ratio in RATIOS:
            found = [_gap(before, known, pair, ratio), _gap(group, labels, pair, ratio)]
            if pair in pairs:
                signs.append([(one.low > 0) - (one.high < 0) for one in found])
            cells = [
                f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in found
            ]
            lines.append([" − ".join(pair), str(ratio), *cells])
    opposed = sum(a * b < 0 for a, b in signs)
    counts = {
        "total": len(signs),
        "opposed": opposed,
        "above": sum(a != 0 for a, _ in signs),
        "here": sum(b != 0 for _, b in signs),
        "both": sum(a * b > 0 for a, b in signs),
    }
    return [
        _ORDER,
        table(["pair, points of facts", "ratio", "above", "here"], lines),
        "",
        (_OPPOSED if opposed else _SAME).format(**counts),
    ]


_NAMES = {
    "renderer": "[Another renderer](#another-renderer)",
    "family": "[A second family](#a-second-family)",
}
_HEADS = {
    "renderer": """## Another renderer

`python -m benchmarks.long confirm renderer` at commit e1e0f49e, `redrawn.py` there:
the same model and scenes, drawn in another way: paper instead of textures, shaded and turned
objects with outlines and shadows, other shades, other fonts, centred lines, objects near the
middle of their place. The model was not trained on such pictures, and nothing was adjusted to its
answers. {items} test questions with
{facts} facts; the full model has these shares right:
{right}. Cells as above.
""",
    "family": """## A second family

`python -m benchmarks.long confirm family --model FOLDER` at commit e1e0f49e:
tiny-gemma3, trained further by `python -m recipes.long.build --model tiny-gemma3` to describe and
count. A picture has 64 tokens, which see each other; ten of twelve layers look back over 48
tokens, so that two layers read most of the picture for most of an answer. All pictures become
224 × 224 px, so `downscale` saves nothing. The weights are not stored.
{items} test questions about pictures of 224 px with three to six objects,
and {facts} facts; the full model has these shares right:
{right}. Cells as above.
""",
}
_ORDER = """\
Are the first three methods in the same order? Paired differences with 95 % intervals; "above" are
those of the first table of this page, for the families of questions asked here.
"""
_SAME = """\
**The order is the same within intervals**: of the {total} differences between the three, {above}
are apart from 0 above and {here} here, {both} of them in both with one sign, none with two."""
_OPPOSED = """\
**The order is not the same**: of the {total} differences between the three, {above} are apart
from 0 above and {here} here, {both} of them in both with one sign, {opposed} with two."""
