"""Answers of one model with and without compression: the HTML page of `tokencomp demo`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import RANDOM, Setting
from tokencomp.inputs.questions import Example
from tokencomp.pages.html import render
from tokencomp.pages.report import Line, plots


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt under one setting.

    `pictures` has one sheet per image or video that shows what the decoder layers see of it; the
    media itself where nothing was removed inside the model. `layers` has, per stage, its first
    layer and such sheets of what remains from there on.
    """

    setting: Setting
    text: str
    cost: Cost
    pictures: list[Any]
    layers: list[tuple[int, list[Any]]]


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

    `facts` are versions, hardware, and the model's size; `table` is that of a report, the full
    model first. The `questions` are shown with pictures; `choice` says which they are.
    """

    model: str
    facts: dict[str, Any]
    table: Sequence[Line]
    questions: list[AnsweredQuestion]
    choice: str = ""

    @property
    def opening(self) -> str:
        """What compression does, for readers to whom it is new."""
        full, name = self.table[0].run.mean_tokens, self.table[-1].run.identity["reducer"]
        return (
            f"The decoder reads a picture or clip as {full:.0f} visual tokens on average. Each "
            "method drops or merges a share of them, the ratio, and the model answers from what is "
            f"left. This is what {name} keeps and saves:"
        )

    @property
    def sentences(self) -> list[str]:
        """What the last method of the table kept at each ratio, and what that cost, in words."""
        label = self.table[-1].run.label
        return [self._sentence(line) for line in self.table[1:] if line.run.label == label]

    def _sentence(self, line: Line) -> str:
        full = self.table[0]
        assert line.run.setting is not None
        text = (
            f"{saved(line.run.setting, mean_cost(line.run), mean_cost(full.run))} "
            f"{line.accuracy:.0%} of {len(line.run.answered)} answers are right; without "
            f"compression {full.accuracy:.0%}"
        )
        random = [
            other.accuracy
            for other in self.table
            if other is not line
            and other.run.identity["reducer"] == RANDOM
            and other.run.shown_ratio == line.run.shown_ratio
        ]
        return text + (f", with as many tokens at random {random[0]:.0%}." if random else ".")


def mean_cost(run: EvalRun) -> Cost:
    """What an answer of a run costs on average."""
    layers = zip(*(r["per_layer"] for r in run.answered), strict=True)
    seen = [round(statistics.fmean(counts)) for counts in layers]
    flops, kv_bytes = round(run.mean("flops")), round(run.mean("kv_bytes"))
    return Cost(round(run.mean("visual_tokens")), seen, flops, kv_bytes)


def saved(setting: Setting, cost: Cost, full: Cost) -> str:
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


def write(demo: Demo, path: str | Path) -> Path:
    """Write the page; everything it needs is inside."""
    title = f"tokencomp on {demo.model}"
    return render("demo.html", path, title=title, demo=demo, plots=plots(demo.table)[:1])
