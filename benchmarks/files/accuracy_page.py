"""The page of `accuracy`: tables, paired tests, and the questions that a rule loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import publishing
from benchmarks.files.material import BACKGROUNDS
from tokencomp.evaluation.metrics import difference, mcnemar

COUNTS, RATIO = (8, 16, 32), 0.75
CHOSEN = f"32 at {RATIO:g}"
RULES = {
    "even": "evenly spaced",
    "stream": "`stream:N`",
    "key frames": "key frames only",
    "aks": "`scorer:aks:N`",
    "focus": "`scorer:focus:N`",
    "known": "the answer known",
}
TRAINED = {
    "tiny-qwen3-vl": ", which was trained on clips of at most 16 frames and 8 seconds",
    "tiny-qwen3-vl-hard": ", which was trained on clips of at most 64 frames and four minutes",
}
Row = dict[str, Any]


def page(report: Row) -> str:
    """The page of a report."""
    rows = report["rows"]
    families = list(dict.fromkeys(r["family"] for r in rows))
    return "\n\n".join(
        [
            f"# Frames of long clips, and answers, on {report['split']} clips",
            publishing.provenance(report),
            _intro(report, families),
            "## By background",
            _accuracy(rows, {b: _where("background", b) for b in BACKGROUNDS}),
            "## By family",
            _accuracy(rows, {f: _where("family", f) for f in families}),
            "## What the frames show",
            "Clips in which chosen frames show all of the evidence / some of it, of those whose "
            "evidence is short.",
            _coverage(rows),
            "## Paired tests",
            "In points, with a paired bootstrap 95 % interval over clips; p is an exact McNemar "
            "test. The three backgrounds of a question are not independent, so that the intervals "
            "are somewhat narrow.",
            _tests(rows),
            "## Lost",
            "Clips that evenly spaced frames answer rightly and the rule does not.",
            _lost(rows),
        ]
    ) + "\n"  # fmt: skip


def _intro(report: Row, families: Sequence[str]) -> str:
    rows = report["rows"]
    ratios = [r["ratio"] for r in rows]
    questions = len({r["id"] for r in rows})
    return (
        f"{report['model']} on {questions} questions of {', '.join(families)}, each about three "
        f"clips: {len(rows)} clips of two minutes, 24 frames per second, H.264 with a key frame "
        "every two seconds. An event lasts half a second; what `direction` asks about lasts the "
        "whole clip, and so does some evidence of `video_existence`. `noisy` has grain of 4 grey "
        "levels; `panning` moves the background by 12 pixels per second. AKS scores one frame per "
        "second with the model's own embeddings, FOCUS three of every 16 seconds and then one per "
        "second of half the clip. *The answer known* takes the frames that show the "
        "evidence, and even ones beside them: what is missing there is the model's"
        f"{TRAINED.get(report['model'], '')}. "
        f"{RATIO:g} is the default method at that ratio (achieved: {np.mean(ratios):.3f}): 32 "
        "frames then have the visual tokens in the decoder that 8 whole frames have. The vision "
        f"tower sees all 32. The last row is the best blind guess. The run took "
        f"{report['cpu'] / 60:.0f} CPU minutes: so few questions "
        "tell large differences alone."
    )


def _where(name: str, value: str) -> Callable[[Row], bool]:
    return lambda row: bool(row[name] == value)


def _keys() -> list[tuple[str, str, str]]:
    """Key, rule and frames of every row of a table."""
    return [(f"{r} {c}", RULES[r], str(c)) for c in (*COUNTS, CHOSEN) for r in RULES]


def _accuracy(rows: Sequence[Row], columns: dict[str, Callable[[Row], bool]]) -> str:
    every: dict[str, Callable[[Row], bool]] = {"all": lambda _: True, **columns}
    groups = {name: [r for r in rows if inside(r)] for name, inside in every.items()}
    head = ("frames", "rule", *(f"{name} ({len(g)})" for name, g in groups.items()))
    body = [
        (frames, rule, *(f"{np.mean([r['right'][key] for r in g]):.1%}" for g in groups.values()))
        for key, rule, frames in _keys()
    ]
    chance = ("–", "blind guess", *(f"{_blind(g):.1%}" for g in groups.values()))
    return publishing.table(head, [*body, chance])


def _blind(rows: Sequence[Row]) -> float:
    """Share of right answers of the best guess by family that sees nothing."""
    right = 0.0
    for family in {r["family"] for r in rows}:
        own = [r for r in rows if r["family"] == family]
        answers = [r["answer"] for r in own]
        right += max(
            max(answers.count(a) for a in set(answers)), sum(1 / len(r["options"]) for r in own)
        )
    return right / len(rows)


def _coverage(rows: Sequence[Row]) -> str:
    groups = {
        b: [r for r in rows if r["background"] == b and next(iter(r["shown"].values()))[1]]
        for b in BACKGROUNDS
    }
    head = ("frames", "rule", *(f"{name} ({len(g)})" for name, g in groups.items()))
    body = []
    for count in COUNTS:
        for rule in ("even", "stream", "key frames", "aks", "focus"):
            seen = [[r["shown"][f"{rule} {count}"] for r in g] for g in groups.values()]
            cells = [f"{sum(a == b for a, b in s)} / {sum(a > 0 for a, _ in s)}" for s in seen]
            body.append((str(count), RULES[rule], *cells))
    return publishing.table(head, body)


def _pairs() -> list[tuple[str, str]]:
    """What is compared with what."""
    chosen = ("stream", "key frames", "aks", "focus")
    rules = [(f"{r} {c}", f"even {c}") for c in COUNTS for r in chosen]
    budget = [(f"{r} {CHOSEN}", f"{r} 8") for r in ("even", "stream", "aks", "focus")]
    whole = [(f"{r} {CHOSEN}", f"{r} 32") for r in ("even", "stream", "aks", "focus")]
    return [*rules, *budget, (f"stream {CHOSEN}", "even 8"), *whole]


def _tests(rows: Sequence[Row]) -> str:
    body = []
    for first, second in _pairs():
        a, b = ([float(r["right"][key]) for r in rows] for key in (first, second))
        test = mcnemar(a, b)
        sizes = [str(test.wins), str(test.losses), f"{test.p:.2g}"]
        body.append((first, second, str(difference(a, b)), *sizes))
    return publishing.table(("frames", "against", "points", "won", "lost", "p"), body)


def _lost(rows: Sequence[Row]) -> str:
    body = []
    for first, second in _pairs():
        lost = [r for r in rows if r["right"][second] and not r["right"][first]]
        names = ", ".join(f"{r['id'].split('-', 1)[1]} {r['background']}" for r in lost[:6])
        more = f", and {len(lost) - 6} more" if len(lost) > 6 else ""
        if lost and second.startswith("even"):
            body.append((first, str(len(lost)), names + more))
    return publishing.table(("frames", "lost", "clips"), body)
