"""The HTML page of `tokencomp demo`: answers of one model with and without compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.settings import RANDOM, Setting
from tokencomp.inputs.questions import Example
from tokencomp.pages.html import render
from tokencomp.pages.report import Line, plots


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt under one setting.

    `pictures` has a sheet per medium of what the layers see; `layers`, per stage, its first layer
    and such sheets from there on; `words` the share of words that `words_kept` counts.
    """

    setting: Setting
    text: str
    cost: Cost
    pictures: list[Any]
    layers: list[tuple[int, list[Any]]]
    words: float | None = None


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question about the file `name`, answered under several settings."""

    name: str
    question: str
    expected: str
    answers: list[Answer]

    @property
    def wide(self) -> bool:
        """Whether the pictures are wide: sheets of a video, or screenshots."""
        return any(a.pictures[0].width > 300 for a in self.answers)

    def mark(self, answer: Answer) -> str:
        """ "right" or "wrong"."""
        return "right" if Example("", "", self.expected).correct(answer.text) else "wrong"


@dataclass(frozen=True)
class Demo:
    """Everything on the page; the full model is first in `table`."""

    model: str
    facts: dict[str, Any]
    table: Sequence[Line]
    questions: list[AnsweredQuestion]
    choice: str = ""

    @property
    def opening(self) -> str:
        """What compression does, for new readers."""
        full, name = self.table[0].run.mean_tokens, self.table[-1].run.identity["reducer"]
        return (
            f"The decoder reads a picture or clip as {full:.0f} visual tokens on average. Each "
            "method drops or merges a share of them, the ratio, and the model answers from what is "
            f"left. This is what {name} keeps and saves:"
        )

    @property
    def sentences(self) -> list[str]:
        """What the last method of the table kept at each ratio, and its cost, in words."""
        label = self.table[-1].run.label
        return [self._sentence(line) for line in self.table[1:] if line.run.label == label]

    def _sentence(self, line: Line) -> str:
        full, setting = self.table[0], line.run.setting
        assert setting is not None
        costs, whole = ({r["id"]: _cost(r) for r in one.run.answered} for one in (line, full))
        both = [name for name in costs if name in whole]
        text = (
            f"{saved(setting, [costs[k] for k in both], [whole[k] for k in both])} "
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


def _cost(record: dict[str, Any]) -> Cost:
    names = ("visual_tokens", "per_layer", "flops", "kv_bytes")
    return Cost(*(record[name] for name in names))


def saved(setting: Setting, costs: Sequence[Cost], full: Sequence[Cost]) -> str:
    """What a setting kept and its cost, relative to the full model on the same prompts."""
    kept, before = (fmean(fmean(c.per_layer) for c in group) for group in (costs, full))
    work = sum(c.flops for c in costs) / sum(c.flops for c in full)
    cache = sum(c.kv_bytes for c in costs) / sum(c.kv_bytes for c in full)
    return (
        f"{setting.name} at {setting.asked}: a decoder layer sees {kept:.0f} of {before:.0f} "
        f"visual tokens on average. That leaves {work:.0%} of the decoder's work and {cache:.0%} "
        "of its cache."
    )


def write(demo: Demo, path: str | Path) -> Path:
    """Write the self-contained page."""
    title = f"tokencomp on {demo.model}"
    return render("demo.html", path, title=title, demo=demo, plots=plots(demo.table)[:1])
