"""The page about long answers, and its table as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment import Files
from benchmarks.long import confirm
from benchmarks.long import forced as teacher
from benchmarks.long.answers import (
    DEFAULT,
    IMAGE_FAMILIES,
    KINDS,
    LENGTHS,
    MIDDLE,
    PLACES,
    RATIOS,
    Answers,
    Group,
    by_length,
    by_place,
    group_name,
    item_of,
    methods_of,
)
from benchmarks.publishing import csv_text, provenance, read, table
from tokencomp.evaluation.settings import DOWNSCALE, FULL, RANDOM, UNIFORM
from tokencomp.zoo.shapesqa import facts as shapesqa
from tokencomp.zoo.shapesqa.facts import Fact
from tokencomp.zoo.shapesqa.long_scenes import LongItem

FOLDER = Path(__file__).resolve().parent
MODEL = "tiny-qwen3-vl-long"
AIM = 85
"""% of the facts right that the full model was to reach in four of five families."""
SHOWN = 4
"""Methods of a kind in the tables of details, the best at 0.75 first."""


def files() -> Files:
    """The page and all numbers, from the stored answers."""
    answers, path = Answers.of(FOLDER, "test"), FOLDER / "forced.json"
    forced = read(path) if path.exists() else None
    again = {
        name: Answers.read(FOLDER / file)
        for name, file in confirm.FILES.items()
        if (FOLDER / file).exists()
    }
    rows = records(answers)
    return {
        FOLDER / "results.csv": csv_text(rows),
        FOLDER / "README.md": page(answers, forced, rows, MODEL, again),
    }


def records(answers: Answers) -> list[dict[str, Any]]:
    """One row per kind of media, family, method and ratio."""
    out = []
    for kind, families in KINDS.items():
        for family in ("all", *families) if len(families) > 1 else families:
            group = Group.of(answers, kind, () if family == "all" else (family,))
            full = group.shares([FULL])
            out.append({"media": kind, "family": family, "method": FULL, "ratio": 0.0, **full})
            for method, by_ratio in methods_of(answers, kind).items():
                for ratio, labels in by_ratio.items():
                    kept = group.retention(labels)
                    reached = [answers.reached[kind][label] for label in labels]
                    out.append(
                        {
                            "media": kind, "family": family, "method": method, "ratio": ratio,
                            "reached": sum(reached) / len(reached), "retention": kept.value,
                            "low": kept.low, "high": kept.high, **group.shares(labels),
                        }
                    )  # fmt: skip
    return out


def whole(kind: str) -> str:
    """All questions about a kind of media, in the rows of `records`."""
    return "all" if len(KINDS[kind]) > 1 else KINDS[kind][0]


def _ranked(rows: Sequence[dict[str, Any]], kind: str, family: str) -> list[str]:
    """Methods of a kind of media, the best retention at `MIDDLE` first."""
    chosen = [r for r in rows if r["media"] == kind and r["family"] == family]
    found = {r["method"]: r["retention"] for r in chosen if r["ratio"] == MIDDLE}
    return sorted(found, key=lambda method: -found[method])


def _row(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values; empty where a method was not asked at a ratio."""
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), {})


def _main_table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    lines = []
    for method in _ranked(rows, kind, whole(kind)):
        cells = []
        for ratio in RATIOS:
            row = _row(rows, media=kind, family=whole(kind), method=method, ratio=ratio)
            cells.append(
                f"{row['retention']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" if row else "–"
            )
        name = f"**{method}**" if method == DEFAULT else method
        lines.append([name, group_name(method), *cells])
    return table(["method", "reads", *(f"ratio {r}" for r in RATIOS)], lines)


def _family_table(rows: Sequence[dict[str, Any]], ratio: float) -> str:
    """Facts kept by family: the full model's share that is right, then the retention."""
    head = ["method", *IMAGE_FAMILIES]
    right = [
        f"{_row(rows, media='images', family=f, method=FULL)['right']:.1%}" for f in IMAGE_FAMILIES
    ]
    lines = [["full model: right", *right]]
    for method in _ranked(rows, "images", "all"):
        cells = [
            f"{_row(rows, media='images', family=f, method=method, ratio=ratio)['retention']:.1%}"
            for f in IMAGE_FAMILIES
        ]
        lines.append([method, *cells])
    return table(head, lines)


def detailed(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """The default, the best methods besides, and the baselines."""
    ranked = _ranked(rows, kind, whole(kind))
    best = [m for m in ranked if m != DEFAULT and group_name(m) != "baseline"][:SHOWN]
    layers = [m for m in ranked if m in ("fastv", "pyramiddrop", "sparsevlm") and m not in best]
    return [DEFAULT, *best, *layers[:1], *(m for m in ranked if m in (RANDOM, UNIFORM, DOWNSCALE))]


def _span(first: int, last: int) -> str:
    if first == last:
        return str(first)
    return f"{first} and more" if last >= 40 else f"{first} to {last}"


def _binned(answers: Answers, rows: Sequence[dict[str, Any]], kind: str, bins: Any, by: Any) -> str:
    """Retention by place or length, of the detailed methods at every ratio."""
    group, methods = Group.of(answers, kind), methods_of(answers, kind)
    lines = []
    for method in detailed(rows, kind):
        for ratio in RATIOS:
            labels = methods[method].get(ratio)
            if labels is None:
                continue
            cells = [
                f"{group.retention(labels, by(*one)).value:.0%}" if group.total(by(*one)) else "–"
                for one in bins
            ]
            lines.append([method, str(ratio), *cells])
    head = ["method", "ratio", *(_span(*one) for one in bins)]
    counts = ["facts", "", *(str(group.total(by(*one))) for one in bins)]
    return table(head, [counts, *lines])


def _errors(answers: Answers, rows: Sequence[dict[str, Any]], kind: str) -> str:
    names = ("right", "changed", "left_out", "invented", "ordered")
    full = _row(rows, media=kind, family=whole(kind), method=FULL)
    lines = [[FULL, "", *(f"{full[n]:.1%}" for n in names)]]
    for method in detailed(rows, kind):
        for ratio in RATIOS:
            found = _row(rows, media=kind, family=whole(kind), method=method, ratio=ratio)
            if found:
                lines.append([method, str(ratio), *(f"{found[n]:.1%}" for n in names)])
    head = ["method", "ratio", "right", "changed", "left out", "invented", "pairs in order"]
    return table(head, lines)


def _short(answers: Answers, rows: Sequence[dict[str, Any]]) -> str:
    """The main numbers, in sentences."""

    def kept(kind: str, method: str) -> str:
        found = (
            _row(rows, media=kind, family=whole(kind), method=method, ratio=r).get("retention")
            for r in RATIOS
        )
        return ", ".join("–" if one is None else f"{100 * one:.1f}" for one in found)

    lines = []
    for kind, others in (
        ("images", ("kcenter", "fastv", RANDOM, DOWNSCALE)),
        ("clips", ("condiv (merge=True)", "kcenter (merge=True)", "fastv", RANDOM, DOWNSCALE)),
    ):
        rest = "; ".join(f"`{method}` {kept(kind, method)}" for method in others)
        lines.append(
            f"- **{kind.capitalize()}**: the default keeps {kept(kind, DEFAULT)} %; {rest}."
        )
        group, labels = Group.of(answers, kind), methods_of(answers, kind)[DEFAULT]
        early, late = (
            [group.retention(labels[ratio], by_place(*span)) for ratio in RATIOS]
            for span in ((1, 2), (3, 40))
        )
        words = [", ".join(f"{100 * one.value:.1f}" for one in some) for some in (early, late)]
        lines.append(
            f"  Of the first two facts of an answer it keeps {words[0]} %, of the "
            f"others {words[1]} %."
        )
    return "\n".join(lines)


def _full(answers: Answers) -> str:
    """What the full model says of the facts of every family, and why some miss `AIM`."""
    rows, missed = [], []
    for kind, families in KINDS.items():
        for family in families:
            pairs = _said(answers, kind, family)
            count = sum(len(one.facts) for one, _ in pairs)
            found = [shapesqa.compare(family, one.facts, said) for one, said in pairs]
            right, changed, left = (
                100 * sum(sum(getattr(one, part)) for one in found) / count
                for part in ("kept", "changed", "left_out")
            )
            numbers = (right, changed, left, 100 * sum(one.invented for one in found) / count)
            rows.append([family, str(count), *(f"{value:.1f}" for value in numbers)])
            missed += [family] if right < AIM else []
    gaps = [_seconds_off(f, said) for one, said in _said(answers, "clips", "follow")
            for f in one.facts]  # fmt: skip
    head = ["family", "facts", "right", "changed", "left out", "invented"]
    return MISSED.format(
        table=table(head, rows), reached=len(rows) - len(missed), families=len(rows), aim=AIM,
        missed=", ".join(missed), events=len(gaps), named=sum(gap is not None for gap in gaps),
        right=sum(gap == 0 for gap in gaps), near=sum(gap == 1 for gap in gaps),
    )  # fmt: skip


def _said(answers: Answers, kind: str, family: str) -> list[tuple[LongItem, list[Fact]]]:
    """The items of a family, and the facts that the full model says."""
    every = zip(answers.ids[kind], answers.texts[kind][FULL], strict=True)
    some = [(item_of(name), text) for name, text in every if name.split("-")[1] == family]
    return [(one, shapesqa.read(family, text)) for one, text in some]


def _seconds_off(event: Fact, said: Sequence[Fact]) -> int | None:
    """Seconds between an event and the same event in an answer; None: the answer has it not."""
    same = [int(one.key) for one in said if one.value == event.value and one.key.isdigit()]
    return min((abs(second - int(event.key)) for second in same), default=None)


def page(
    answers: Answers,
    forced: dict[str, Any] | None,
    rows: Sequence[dict[str, Any]],
    model: str,
    again: Mapping[str, Answers],
) -> str:
    """The page, in Markdown."""
    count = {kind: len(ids) for kind, ids in answers.ids.items()}
    facts = {kind: Group.of(answers, kind).total(lambda p, n: True) for kind in KINDS}
    clips = _row(rows, media="clips", family="follow", method=FULL)
    parts = [
        HEAD.format(
            model=model, images=count["images"], clips=count["clips"], facts=facts["images"],
            clip_facts=facts["clips"],
        ),
        _short(answers, rows),
        *(confirm.short(name, here) for name, here in again.items()), "",
        "## The full model\n", _full(answers), "",
        "## Images\n", _main_table(rows, "images"), "",
        f"By family, ratio {MIDDLE}:\n", _family_table(rows, MIDDLE), "",
        "## Clips\n", f"The full model has {clips['right']:.1%} of the facts right.\n",
        _main_table(rows, "clips"), "",
        "## By place in the answer\n",
    ]  # fmt: skip
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}**: as above, of the facts at these places.\n"]
        parts += [_binned(answers, rows, kind, PLACES, by_place), ""]
    parts += ["## By length of the answer, in facts\n"]
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}**\n"]
        parts += [_binned(answers, rows, kind, LENGTHS, by_length), ""]
    parts += ["## Left out, changed, invented\n", ERRORS]
    for kind in KINDS:
        parts += [f"**{kind.capitalize()}**\n", _errors(answers, rows, kind), ""]
    if forced is not None:
        parts += [teacher.section(forced)]
    parts += [confirm.section(name, answers, here) for name, here in again.items()]
    parts += ["## Provenance\n", *(f"- {provenance(about)}" for about in answers.about)]
    parts += [f"- {provenance(about)}" for about in (forced or {"about": []})["about"]]
    parts += [f"- {provenance(about)}" for here in again.values() for about in here.about]
    return "\n".join(parts) + "\n"


HEAD = """# Long answers: what is left after the first token

Most accuracies of this repository are of answers of one or two words. Here [{model}](
../../zoo/tokencomp_zoo/models/{model}/README.md) writes 20 to 200 tokens: it describes every object
of a picture, counts aloud, reads a page, says what is new in a second picture (images), and follows
a clip second by second. Every answer is made of facts that a parser reads back
(`tokencomp.zoo.shapesqa.facts`).

`python -m benchmarks.long answer`; from the stored answers, `python -m benchmarks.long page` makes
this page and [all numbers](../README.md#tables-as-csv). {images} test
questions about images with {facts} facts and {clips} about clips with {clip_facts}, greedy. Cells:
mean share of the facts of an answer that is right, divided by that of the full model, with paired
95 % intervals over questions; a fact is right if all of it is. Reads: what the
choice depends on. No setting was chosen on these questions.

At the ratios 0.5, 0.75 and 0.9:
"""
MISSED = """{table}

Per 100 facts of the scenes. {reached} of {families} families have {aim} % right, where four were
wanted; {missed} have not. Counting and comparing miss objects and invent others. Of clips the model
names {named} of {events} events with object, place and kind, {right} at the right second and {near}
one second off: most wrong facts of clips are wrong seconds."""
ERRORS = """Shares of all facts of the scenes. Changed: the place, second or word is named with
something else. Invented: facts with a key that the scene does not have. Order: neighbouring kept
facts in the order of the scene.
"""
