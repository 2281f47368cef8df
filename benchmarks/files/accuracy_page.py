"""The page and the data of `accuracy`."""

from __future__ import annotations

import itertools
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
    budgets = [str(count) for count in COUNTS] + [CHOSEN]
    body = [
        [text, *(f"{np.mean([r['right'][f'{rule} {n}'] for r in rows]):.1%}" for n in budgets)]
        for rule, text in RULES.items()
    ]
    body.append(["blind guess", *([f"{_blind(rows):.1%}"] * len(budgets))])
    head = ["rule", *(f"{n} frames" for n in COUNTS), f"32 frames, ratio {RATIO:g}"]
    return "\n\n".join(
        [
            "# Which rule for choosing frames answers most questions about long clips?",
            publishing.table(head, body),
            _intro(report),
        ]
    ) + "\n"  # fmt: skip


def _intro(report: Row) -> str:
    rows = report["rows"]
    families = list(dict.fromkeys(r["family"] for r in rows))
    questions, ratio = len({r["id"] for r in rows}), np.mean([r["ratio"] for r in rows])
    return (
        f"Right answers of {report['model']} to {questions} {report['split']} questions of "
        f"{', '.join(families)}, each about three clips with another background: {len(rows)} clips "
        "of two minutes, 24 frames per second, H.264 with a key frame every two seconds. An event "
        "lasts half a second; what `direction` asks about lasts the whole clip. AKS scores one "
        "frame per second with the model's own embeddings, FOCUS three of every 16 seconds and "
        "then one per second of half the clip. *The answer known* takes the frames that show the "
        f"evidence: what is missing there is the model's{TRAINED.get(report['model'], '')}. Ratio "
        f"{RATIO:g} (achieved: {ratio:.3f}) with the default method leaves 32 frames the visual "
        "tokens of 8 in the decoder; the vision tower sees all 32. "
        f"{report['cpu'] / 60:.0f} CPU minutes, so few questions: only large differences are "
        f"certain. [By background and family, coverage and paired tests]({publishing.TABLES})."
    )


def records(report: Row) -> list[Row]:
    """The rows of the CSV file: accuracy by group, coverage, and tests against another rule.

    `shows_all` and `shows_some`: clips with short evidence of which the chosen frames show all or
    some. The three backgrounds of a question are not independent: intervals are somewhat narrow.
    """
    rows, found = report["rows"], []
    families = dict.fromkeys(r["family"] for r in rows)
    groups = {b: _where("background", b) for b in BACKGROUNDS}
    groups |= {f: _where("family", f) for f in families}
    against = dict(_pairs())
    for rule, count in itertools.product(RULES, (*COUNTS, CHOSEN)):
        key = f"{rule} {count}"
        row: Row = {"frames": count, "rule": RULES[rule]}
        row["all"] = float(np.mean([r["right"][key] for r in rows]))
        for name, inside in groups.items():
            row[name] = float(np.mean([r["right"][key] for r in rows if inside(r)]))
        seen = [r["shown"][key] for r in rows if key in r["shown"] and r["shown"][key][1]]
        row |= {"short_evidence": len(seen), "shows_all": sum(a == b for a, b in seen)}
        row["shows_some"] = sum(a > 0 for a, _ in seen)
        if key in against:
            a, b = ([float(r["right"][k]) for r in rows] for k in (key, against[key]))
            test, gap = mcnemar(a, b), difference(a, b)
            row |= {"against": against[key], "points": gap.value, "low": gap.low, "high": gap.high}
            row |= {"won": test.wins, "lost": test.losses, "p": test.p}
        found.append(row)
    return found


def _where(name: str, value: str) -> Callable[[Row], bool]:
    return lambda row: bool(row[name] == value)


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


def _pairs() -> list[tuple[str, str]]:
    """What is compared with what."""
    chosen = ("stream", "key frames", "aks", "focus")
    rules = [(f"{r} {c}", f"even {c}") for c in COUNTS for r in chosen]
    return [*rules, *((f"{r} {CHOSEN}", f"{r} 8") for r in ("even", "stream", "aks", "focus"))]
