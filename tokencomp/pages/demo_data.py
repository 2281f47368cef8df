"""What the page of `tokencomp demo` shows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.metrics import McNemar, Retention
from tokencomp.evaluation.settings import Setting
from tokencomp.profiling.timing import Split


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
    accuracy: float | None = None
    by_kind: dict[str, float] = field(default_factory=dict)
    retention: Retention | None = None
    against_random: McNemar | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt under one setting.

    Attributes
    ----------
    setting, text, cost
    pictures
        One sheet per image or video that shows what the decoder layers see of it; the media itself
        where nothing was removed inside the model.
    layers
        Per stage: its first layer, and one sheet per image or video of what remains from there on.
    """

    setting: Setting
    text: str
    cost: Cost
    pictures: list[Any]
    layers: list[tuple[int, list[Any]]]


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question about one file, answered under several settings.

    Attributes
    ----------
    name
        Of the file.
    question
    expected
        The right answer, where it is known.
    answers
    """

    name: str
    question: str
    expected: str | None
    answers: list[Answer]


@dataclass(frozen=True)
class Demo:
    """Everything on the page.

    Attributes
    ----------
    model
        Its name.
    facts
        Versions, hardware, and the model's size.
    rows
        Of the table; the full model comes first.
    questions
        Shown with pictures.
    items, failed
        How many ShapesQA questions were answered, and how many could not be.
    """

    model: str
    facts: dict[str, Any]
    rows: list[Row]
    questions: list[AnsweredQuestion]
    items: int = 0
    failed: int = 0
