"""Result files that readers send: their schema, and how they are made from run folders.

A file holds one bit per item and method, not the answers, so that every paired statistic can be
computed again, and nothing that a benchmark's licence would keep from being published.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.gpu.catalogue import LOADS, TABLES
from tokencomp.errors import OptionError
from tokencomp.evaluation.group_runs import find_runs
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL

FORMAT = 1


class Strict(BaseModel):
    """A part of a result file: other fields than those named are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(Strict):
    """Where the numbers of a file come from."""

    model: str
    date: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$", description="Of a checkout without changes.")
    versions: dict[str, str]
    hardware: dict[str, Any]


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
            raise ValueError("a ratio occurs twice at the same number of clients")
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


class Row(Strict):
    """What one setting cost, and lmms-eval's own scores."""

    label: str
    reducer: str
    ratio: float = Field(ge=0, lt=1)
    options: dict[str, Any]
    frames: int = Field(ge=1)
    reached: float = Field(ge=-0.5, lt=1)
    visual_tokens: float = Field(gt=0)
    flops: float = Field(gt=0)
    kv_bytes: float = Field(gt=0)
    seconds: float = Field(ge=0)
    failed: int = Field(ge=0)
    scores: dict[str, dict[str, float]]


class About(Origin):
    """What the numbers depend on."""

    weights: str
    dtype: str
    tasks: list[str]
    data: list[str]
    limit: int | None


class Contribution(Strict):
    """One file under `results/`."""

    format: Literal[1] = FORMAT
    table: str
    about: About
    rows: list[Row] = Field(min_length=1)
    answers: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Contribution:
        packed = PackedAnswers.from_json(self.answers)
        labels = [row.label for row in self.rows]
        if self.table not in TABLES:
            raise ValueError(f"table {self.table!r} is none of {', '.join(TABLES)}")
        if labels[0] != FULL or self.rows[0].reducer != FULL:
            raise ValueError("the first row must be the full model")
        if list(packed.correct) != labels or list(packed.agrees) != labels:
            raise ValueError("the packed answers and the rows name different settings")
        if not all(packed.agrees[FULL]):
            raise ValueError("the full model must agree with itself")
        return self

    @property
    def packed(self) -> PackedAnswers:
        return PackedAnswers.from_json(self.answers)


def read(path: Path) -> Contribution | ServingFile:
    """A result file, checked by the schema of its table.

    Raises
    ------
    OptionError
        It does not fit the schema; the message names each field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        known = json.loads(text)
        serving = isinstance(known, dict) and known.get("table") in LOADS
        return (ServingFile if serving else Contribution).model_validate_json(text)
    except (ValidationError, OSError, ValueError) as error:
        raise OptionError(f"{path}: not a result file ({error}).") from error


def collect(table: str, steps: Sequence[Path]) -> Contribution:
    """One result file from the run folders of all steps.

    Raises
    ------
    OptionError
        A step is missing or not finished, or the code had uncommitted changes.
    """
    runs: dict[str, EvalRun] = {}
    for number, step in enumerate(steps):
        for run in find_runs([step]):
            label = label_of(run, number)
            runs[label] = replace(run, records=[_bit(r) for r in run.records])
    runs = {FULL: runs[FULL], **runs}
    shared = set.intersection(*({r["id"] for r in run.answered} for run in runs.values()))
    if not shared:
        raise OptionError(f"no item was answered under all settings of {table}.")
    common = {
        label: replace(run, records=[r for r in run.records if r["id"] in shared])
        for label, run in runs.items()
    }
    packed = PackedAnswers.of(common, FULL)
    # Reference answers belong to the benchmarks; the digest alone tells question sets apart.
    unnamed = replace(packed.questions, answers=("",) * len(packed.questions))
    answers = replace(packed, questions=unnamed).to_json()
    rows = [row_of(label, run) for label, run in runs.items()]
    first = runs[FULL]
    known = ("model", "weights", "dtype", "tasks", "data", "limit")
    about = {name: first.identity.get(name) for name in known}
    about |= {k: first.manifest.get(k) for k in ("date", "commit", "versions", "hardware")}
    try:
        return Contribution.model_validate(
            {"table": table, "about": about, "rows": rows, "answers": answers}
        )
    except ValidationError as error:
        raise OptionError(
            f"these runs cannot be contributed: {error}. A commit must be the 40 digits of a "
            "checkout without uncommitted changes."
        ) from error


def label_of(run: EvalRun, step: int = 0) -> str:
    """Key of the run, which no other run of the table has."""
    at = "" if run.identity["reducer"] == FULL else f" at {run.ratio:g}"
    return run.label + at + (f", {run.identity['frames']} frames" if step else "")


def _bit(record: dict[str, Any]) -> dict[str, Any]:
    """An item counts as right from a score of one half on."""
    if record.get("error"):
        return record
    return {**record, "correct": float(record["correct"]) >= 0.5}


def row_of(label: str, run: EvalRun) -> dict[str, Any]:
    """The fields of a `Row`."""
    return {
        "label": label,
        **{k: run.identity[k] for k in ("reducer", "ratio", "options", "frames")},
        "reached": run.mean("ratio"),
        "visual_tokens": run.mean_tokens,
        "flops": run.mean("flops"),
        "kv_bytes": run.mean("kv_bytes"),
        "seconds": run.mean("seconds"),
        "failed": len(run.failed),
        "scores": run.manifest.get("scores", {}),
    }


def schema() -> str:
    """The JSON schema of a result file: of accuracy, or of serving under load."""
    either = TypeAdapter(Contribution | ServingFile).json_schema()
    return json.dumps(either, indent=2) + "\n"
