"""The HTML page of `tokencomp demo`: answers of one model with and without compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.questions import Example
from tokencomp.pages.html import render
from tokencomp.pages.report import Line


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


COLUMNS = ("method", "image tokens", "right", "LLM work", "KV cache", "seconds")


@dataclass(frozen=True)
class Demo:
    """Everything on the page; the full model is first in `table`."""

    model: str
    facts: dict[str, Any]
    table: Sequence[Line]
    questions: list[AnsweredQuestion]
    choice: str = ""

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table, with the cells of `COLUMNS`. Tokens and seconds are means per question."""
        rows: list[tuple[str, ...]] = []
        for line in self.table:
            run, count = line.run, len(line.run.answered)
            name = line.label if line is self.table[0] else f"{line.label} {run.shown_ratio}"
            means = f"{run.mean_tokens:.0f}", f"{line.accuracy * count:.3g} of {count}"
            costs = f"{line.flops:.0%}", f"{line.kv_bytes:.0%}", f"{run.mean('seconds'):.2f}"
            rows.append((name, *means, *costs))
        return rows

    @property
    def price(self) -> str:
        """What the last row saves, what it costs, and how far that reaches."""
        full, last = self.table[0], self.table[-1]
        count = len(last.run.answered)
        lost = full.accuracy * len(full.run.answered) - last.accuracy * count
        answers = f"{lost:.3g} right answers fewer" if lost > 0 else "no right answer"
        return (
            f"{last.label} at ratio {last.run.shown_ratio} saves {1 - last.flops:.0%} of the LLM's "
            f"work and {1 - last.kv_bytes:.0%} of its KV cache, and costs {answers} here. "
            f"{count} questions show how it works; they do not measure accuracy."
        )


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
    return render("demo.html", path, title=title, demo=demo, columns=COLUMNS)
