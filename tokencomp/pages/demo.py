"""The HTML page of `tokencomp demo`, and what it shows as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.metrics import McNemar, Retention
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import Split
from tokencomp.inputs.questions import Example
from tokencomp.pages.html import render
from tokencomp.pages.measured import TOY, prefill_speed
from tokencomp.pages.pictures import stacked
from tokencomp.pages.plots import Point, accuracy_point, lines


@dataclass(frozen=True)
class Row:
    """One line of the table: a setting against the full model and against random dropping."""

    setting: Setting
    per_layer: list[int]
    ratio: float
    flops: float
    kv_bytes: float
    split: Split
    prefill_ratio: float
    accuracy: float
    by_modality: dict[str, float] = field(default_factory=dict)
    retention: Retention | None = None
    against_random: McNemar | None = None
    deviation: str = ""
    seeds: int = 0

    @property
    def label(self) -> str:
        """The method and its seeds, marked where its cuts are not where its paper has them."""
        seeds = f" ({self.seeds} seeds)" if self.seeds else ""
        return self.setting.name + seeds + ("†" if self.deviation else "")


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt under one setting.

    `pictures` has one sheet per image or video that shows what the decoder layers see of it; the
    media itself where nothing was removed inside the model. `layers` has, per stage, its first
    layer and such sheets of what remains from there on, and `clips`, per video, the pictures of its
    sheet, to be shown one after the other.
    """

    setting: Setting
    text: str
    cost: Cost
    pictures: list[Any]
    layers: list[tuple[int, list[Any]]]
    clips: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question about the file `name`, answered under several settings."""

    name: str
    question: str
    expected: str
    answers: list[Answer]

    @property
    def wide(self) -> bool:
        """Whether the pictures need room: sheets of a video."""
        return any(a.pictures[0].width > 300 for a in self.answers)

    def mark(self, answer: Answer) -> str:
        """ "right" or "wrong"."""
        return "right" if Example("", "", self.expected).correct(answer.text) else "wrong"


@dataclass(frozen=True)
class Demo:
    """Everything on the page.

    `facts` are versions, hardware, and the model's size. The full model comes first in `rows`,
    those of the table, for which `items` questions were answered and `failed` could not be. The
    `questions` are shown with pictures; `choice` says which they are.
    """

    model: str
    facts: dict[str, Any]
    rows: list[Row]
    questions: list[AnsweredQuestion]
    items: int
    failed: int
    choice: str = ""

    @property
    def opening(self) -> str:
        """What compression does, for readers to whom it is new."""
        full, name = self.rows[0].per_layer[0], self.rows[-1].setting.name
        return (
            f"The decoder reads a video as {full} visual tokens. Each method drops or merges a "
            "share of them, the ratio, and the model answers from what is left. "
            f"This is what {name} keeps and saves:"
        )

    @property
    def sentences(self) -> list[str]:
        """What the last method of the table kept at each ratio, and what that cost, in words."""
        name = self.rows[-1].setting.name
        chosen = [r for r in self.rows[1:] if r.setting.name == name]
        return [_sentence(row, self.rows, self.items) for row in chosen]

    @property
    def moves(self) -> list[str]:
        """Which methods the ratio moves in a decoder of this depth, and how."""
        rows = [row for row in self.rows if row.deviation]
        return [f"† {r.setting.name} at {r.setting.shown_ratio} {r.deviation}." for r in rows]


def saved(setting: Setting, cost: Row | Cost, full: Row | Cost) -> str:
    """What a setting kept and what that costs, beside the full model, in two sentences."""
    kept, before = (sum(c.per_layer) / len(c.per_layer) for c in (cost, full))
    merged = kept < before and cost.kv_bytes >= full.kv_bytes
    rest = ", the rest merged into them" if merged else ""
    cache = f"{cost.kv_bytes / full.kv_bytes:.0%} of its cache"
    cache += ", in which merged tokens are repeated" if merged else ""
    return (
        f"{setting.name} at {setting.asked}: a decoder layer sees {kept:.0f} of {before:.0f} "
        f"visual tokens on average{rest}. That leaves {cost.flops / full.flops:.0%} of the "
        f"decoder's work and {cache}."
    )


def _sentence(row: Row, rows: list[Row], items: int) -> str:
    full = rows[0]
    text = (
        f"{saved(row.setting, row, full)} {row.accuracy:.0%} of {items} answers are right; without "
        f"compression {full.accuracy:.0%}"
    )
    random = [
        r.accuracy
        for r in rows
        if r.setting.name == "random" and r.setting.shown_ratio == row.setting.shown_ratio
    ]
    if random and row.setting.name != "random":
        text += f", with as many tokens at random {random[0]:.0%}"
    return text + "."


def write(demo: Demo, path: str | Path) -> Path:
    """Write the page; everything it needs is inside."""
    return render(
        "demo.html",
        path,
        title=f"tokencomp on {demo.model}",
        demo=demo,
        plots=_plots(demo),
        measured=prefill_speed(),
        toy=TOY,
    )


def kept_sheet(demo: Demo) -> Image.Image:
    """One picture of all questions: under each other, the media and what the last method kept."""
    rows = [[*q.answers[0].pictures, *q.answers[-1].pictures] for q in demo.questions]
    return stacked([stacked(row, across=True) for row in rows])


def _plots(demo: Demo) -> list[str]:
    accuracy: dict[str, list[Point]] = {}
    work: dict[str, list[Point]] = {}
    full = demo.rows[0]
    for row in demo.rows[1:]:
        name = row.setting.name
        point = accuracy_point(row.ratio, row.accuracy, row.retention, full.accuracy)
        accuracy.setdefault(name, []).append(point)
        work.setdefault(name, []).append(Point(row.flops / full.flops, row.prefill_ratio))
    plots = [
        lines(
            accuracy,
            x="achieved ratio (visual-token work removed)",
            y="accuracy",
            reference=full.accuracy,
        )
    ]
    if demo.facts["parameters"] >= TOY:  # times of a toy say nothing about methods
        axes = ("decoder FLOPs against the full model", "LLM prefill time against the full model")
        plots.append(lines(work, x=axes[0], y=axes[1], diagonal=True))
    return plots
