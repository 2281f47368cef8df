"""Times that were measured on the shapes of real models, as this package has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.method import DEFAULT_REDUCER
from tokencomp.storage import write_lines

TOY = 50_000_000
"""Parameters below which the time of a model says nothing about real ones."""
PREFILL = Path(__file__).with_name("prefill.jsonl")
"""What `benchmarks/models/prefill.py` keeps of its results for the package."""


@dataclass(frozen=True)
class PrefillSpeed:
    """How many times as fast the LLM prefill is with one reducer, a column per ratio.

    A row has the name of a shape, visual tokens, and one value per ratio (None: not measured).
    `where` says hardware, versions, command and date.
    """

    reducer: str
    ratios: list[float]
    rows: list[tuple[str, int, list[float | None]]]
    where: str


def keep(records: Iterable[Mapping[str, Any]], file: Path = PREFILL) -> None:
    """Write what `prefill_speed` reads of the results with the default reducer."""
    names = ("model", "visual_tokens", "reducer", "ratio", "speedup", "dtype", "environment")
    own = [{n: r[n] for n in names} for r in records if r["reducer"] == DEFAULT_REDUCER]
    write_lines(file, own)


def prefill_speed(file: Path = PREFILL, reducer: str = DEFAULT_REDUCER) -> PrefillSpeed | None:
    """The measured times of one reducer; None where this copy of tokencomp has no results."""
    if not file.exists():
        return None
    every = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in every if line["reducer"] == reducer]
    if not lines:
        return None
    ratios = sorted({line["ratio"] for line in lines})
    known = {(r["model"], r["visual_tokens"], r["ratio"]): r["speedup"] for r in lines}
    shapes = dict.fromkeys((line["model"], line["visual_tokens"]) for line in lines)
    rows = [(*shape, [known.get((*shape, ratio)) for ratio in ratios]) for shape in shapes]
    facts = lines[-1]["environment"]
    hardware = facts["hardware"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['threads']} threads"
    where = (
        f"{device}, {lines[-1]['dtype']}, random weights, without the vision tower; torch "
        f"{facts['versions']['torch']}, {facts['date'][:10]}; benchmarks/models/prefill.md."
    )
    return PrefillSpeed(reducer, ratios, rows, where)
