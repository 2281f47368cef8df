"""The result file of the table of serving under load, and the table that follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from benchmarks import publishing
from benchmarks.gpu.result_file import FORMAT, Origin, Strict

COLUMNS = (
    "clients", "ratio", "requests", "failed", "first token, ms", "95 %", "×", "requests/s", "×",
    "text pieces/s",
)  # fmt: skip


class Answer(Strict):
    """One request: seconds to the first token and in all, and pieces of text; or its error."""

    first: float | None = Field(default=None, gt=0)
    total: float | None = Field(default=None, gt=0)
    pieces: int | None = Field(default=None, ge=0)
    error: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Answer:
        times = (self.first, self.total, self.pieces)
        if (self.error is None) != all(value is not None for value in times):
            raise ValueError("a request has either its times or an error")
        return self


class Load(Strict):
    """All requests of one ratio and one number of clients."""

    ratio: float = Field(ge=0, lt=1)
    clients: int = Field(ge=1)
    seconds: float = Field(gt=0)
    requests: list[Answer] = Field(min_length=1)


class ServingAbout(Origin):
    """What the numbers depend on."""

    engine: str
    work: dict[str, int]


class ServingFile(Strict):
    """One file of the table under `results/`."""

    format: Literal[1] = FORMAT
    table: str
    about: ServingAbout
    loads: list[Load] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ServingFile:
        pairs = [(load.clients, load.ratio) for load in self.loads]
        if len(set(pairs)) < len(pairs):
            raise ValueError("a ratio stands twice at the same number of clients")
        missing = {clients for clients, _ in pairs} - {c for c, ratio in pairs if ratio == 0}
        if missing:
            raise ValueError(f"ratio 0 is missing at {sorted(missing)} clients")
        return self


def table_lines(loads: Sequence[Load]) -> list[str]:
    """One line per number of clients and ratio, with factors against ratio 0."""
    base = {load.clients: load for load in loads if load.ratio == 0}
    ordered = sorted(loads, key=lambda one: (one.clients, one.ratio))
    rows = [_cells(load, base[load.clients]) for load in ordered]
    return publishing.table(COLUMNS, rows).splitlines()


def _cells(load: Load, base: Load) -> list[str]:
    times = first_tokens(load)
    failed = len(load.requests) - len(times)
    head = [str(load.clients), f"{load.ratio:g}", str(len(load.requests)), str(failed)]
    reference = first_tokens(base)
    if not times or not reference:
        return [*head, *["–"] * (len(COLUMNS) - len(head))]
    median, rate = statistics.median(times), len(times) / load.seconds
    pieces = sum(answer.pieces or 0 for answer in load.requests) / load.seconds
    return [
        *head,
        f"{1e3 * median:.0f}",
        f"{1e3 * percentile(times, 0.95):.0f}",
        f"{statistics.median(reference) / median:.2f}",
        f"{rate:.2f}",
        f"{rate / (len(reference) / base.seconds):.2f}",
        f"{pieces:.0f}",
    ]


def first_tokens(load: Load) -> list[float]:
    """Seconds to the first token of the requests that were answered."""
    return [answer.first for answer in load.requests if answer.first is not None]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    rank = -(-round(share * len(ordered) * 1e9) // 10**9)
    return ordered[max(0, min(len(ordered), rank) - 1)]
