"""The same questions to the model about other pictures, and to a model of another family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count, islice
from pathlib import Path
from typing import Any

from benchmarks.long.answers import (
    DEFAULT,
    MIDDLE,
    RATIOS,
    Answers,
    Group,
    ask,
    group_name,
    methods_of,
)
from benchmarks.long.redrawn import redrawn
from benchmarks.publishing import environment, table
from tokencomp.evaluation.metrics import Difference, difference
from tokencomp.evaluation.settings import DOWNSCALE, FULL, MERGE, RANDOM, UNIFORM, Setting
from tokencomp.zoo.shapesqa.long_scenes import SIDE, LongItem, item

KIND = "images"
Asked = tuple[tuple[str, dict[str, Any]], ...]
_MERGED: dict[str, Any] = {MERGE: True}


@dataclass(frozen=True)
class Confirmation:
    """What is asked again, and where the answers are stored.

    Attributes
    ----------
    file
        Name of the file of answers.
    each
        Questions of a family.
    families
        Families of questions about pictures.
    methods
        Reducers with their options, at all of `RATIOS`.
    other : bool
        Whether pictures are drawn by `redrawn`.
    sides, most
        Sides of the pictures that are asked about, and their largest number of objects.
    """

    file: str
    each: int
    families: tuple[str, ...]
    methods: Asked
    other: bool
    sides: tuple[int, ...] = SIDE
    most: int = 12

    def settings(self) -> list[Setting]:
        """The full model first; smaller pictures replace what the tower gave: they come last."""
        return [Setting(), *(Setting(n, r, dict(o)) for n, o in self.methods for r in RATIOS)]

    def items(self, split: str, families: Sequence[str] = (), each: int = 0) -> list[LongItem]:
        """The first items of every family whose pictures fit."""
        out = []
        for family in families or self.families:
            every = (item(split, family, k) for k in count())
            out += islice(filter(self._fits, every), each or self.each)
        return [redrawn(one) for one in out] if self.other else out

    def _fits(self, one: LongItem) -> bool:
        scene = one.scenes[0]
        return scene.width in self.sides and len(scene.things) <= self.most


CONFIRMATIONS = {
    "renderer": Confirmation(
        "other-renderer.json",
        24,
        ("describe", "count", "read", "compare"),
        (
            (DEFAULT, {}), ("condiv", {}), ("condiv", _MERGED), ("kcenter", {}),
            (RANDOM, {}), (UNIFORM, {}), (DOWNSCALE, {}),
        ),
        other=True,
    ),
    "family": Confirmation(
        "second-family.json",
        100,
        ("describe", "count"),
        (
            (DEFAULT, {}), ("condiv", {}), ("condiv", _MERGED), ("kcenter", _MERGED),
            ("fastv", {}), (RANDOM, {}), (UNIFORM, {}),
        ),
        other=False,
        sides=SIDE[:1],
        most=6,
    ),
}  # fmt: skip


def confirm(
    name: str, loaded: tuple[Any, Any], folder: Path, build: Path, batch: int, facts: dict[str, Any]
) -> None:
    """Ask, and store the answers."""
    how = CONFIRMATIONS[name]
    items = how.items("test")
    runs = ask(*loaded, items, how.settings(), build / name, batch)
    texts, reached = {}, {}
    for setting, run in runs.items():
        said = {record["id"]: record["prediction"] for record in run.answered}
        texts[setting.label] = [said[one.id] for one in items]
        reached[setting.label] = round(float(run.summary().get("achieved_ratio", 0.0)), 4)
    stored = Answers()
    stored.add(KIND, [one.id for one in items], texts, reached, {**environment(), **facts})
    stored.write(folder / how.file)


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
**The order is the same within intervals**: of the {total} differences between the three, {above}
are apart from 0 above and {here} here, {both} of them in both with one sign, none with two."""
_OPPOSED = """\
**The order is not the same**: of the {total} differences between the three, {above} are apart
from 0 above and {here} here, {both} of them in both with one sign, {opposed} with two."""
