"""The HTML page of `tokencomp demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from tokencomp.inputs.questions import Example
from tokencomp.pages.demo_data import Answer, AnsweredQuestion, Demo, Row
from tokencomp.pages.html import compact, render
from tokencomp.pages.measured import TOY, prefill_speed
from tokencomp.pages.pictures import animation_uri, data_uri, stacked
from tokencomp.pages.plots import Point, lines


def write(demo: Demo, path: str | Path) -> Path:
    """Write the page; everything it needs is inside."""
    return render(
        "demo.html",
        path,
        title=f"tokencomp on {demo.model}",
        demo=demo,
        plots=_plots(demo) if demo.items else [],
        questions=[_question(q) for q in demo.questions],
        measured=prefill_speed(),
        toy=TOY,
    )


def kept_sheet(demo: Demo) -> Image.Image:
    """One picture of all questions: under each other, the media and what the last method kept."""
    rows = [[*q.answers[0].pictures, *q.answers[-1].pictures] for q in demo.questions]
    return stacked([stacked(row, across=True) for row in rows])


def _plots(demo: Demo) -> list[Any]:
    from markupsafe import Markup

    accuracy: dict[str, list[Point]] = {}
    work: dict[str, list[Point]] = {}
    full = demo.rows[0]
    for row in demo.rows[1:]:
        name = row.setting.name
        accuracy.setdefault(name, []).append(_accuracy_point(row, full))
        work.setdefault(name, []).append(Point(row.flops / full.flops, row.prefill_ratio))
    figures = [
        lines(
            accuracy,
            x="achieved ratio (visual-token work removed)",
            y="accuracy",
            reference=full.accuracy,
        ),
        lines(
            work,
            x="decoder FLOPs against the full model",
            y="LLM prefill time against the full model",
            diagonal=True,
        ),
    ]
    return [Markup(svg) for svg in figures]


def _accuracy_point(row: Row, full: Row) -> Point:
    assert row.accuracy is not None
    if row.retention is None or full.accuracy is None:
        return Point(row.ratio, row.accuracy)
    low, high = row.retention.low * full.accuracy, row.retention.high * full.accuracy
    return Point(row.ratio, row.accuracy, low, min(high, 1.0))


def _question(question: AnsweredQuestion) -> dict[str, Any]:
    answers = [_answer(a, question.expected) for a in question.answers]
    wide = any(len(a.cost.per_layer) and a.pictures[0].width > 300 for a in question.answers)
    return {
        "name": question.name,
        "question": question.question,
        "expected": question.expected,
        "answers": answers,
        "wide": wide,
    }


def _answer(answer: Answer, expected: str | None) -> dict[str, Any]:
    mark = ""
    if expected is not None:
        right = Example("", "", expected).correct(answer.text)
        mark = "right" if right else "wrong"
    return {
        "label": answer.setting.name,
        "ratio": "" if answer.setting.off else answer.setting.shown_ratio,
        "text": answer.text,
        "mark": mark,
        "tokens": compact(answer.cost.per_layer),
        "uris": [data_uri(p) for p in answer.pictures],
        "moving": [animation_uri(tiles) for tiles in answer.clips if len(tiles) > 1],
    }
