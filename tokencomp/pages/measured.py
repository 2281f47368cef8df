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
    """How many times as fast the LLM prefill is with compression, a column per ratio.

    A row has the name of a shape, the modality, visual tokens, the method, and one value per
    ratio (None: not measured). `where` says hardware, versions and dates.
    """

    ratios: list[float]
    rows: list[tuple[str, str, int, str, list[float | None]]]
    where: str


def kind_of(record: Mapping[str, Any]) -> str:
    """The media of a record; older ones are all of videos."""
    return record.get("kind", "video")


def method_of(record: Mapping[str, Any]) -> str:
    """The reducer as it was called when it was measured, and what differs from its default."""
    merge = record.get("merge", record.get("rest"))  # as older records say it
    dropped = record["reducer"] == DEFAULT_REDUCER and merge in (False, "drop")
    return record["reducer"] + (" merge=False" if dropped else "")


def keep(records: Iterable[Mapping[str, Any]], file: Path = PREFILL) -> None:
    """Write what `prefill_speed` reads of the results with the default reducer, if any."""
    names = (
        "model",
        "kind",
        "visual_tokens",
        "reducer",
        "rest",
        "merge",
        "ratio",
        "speedup",
        "dtype",
    )
    own = [r for r in records if r["reducer"] == DEFAULT_REDUCER]
    if own:
        write_lines(file, [{n: r[n] for n in (*names, "environment") if n in r} for r in own])


def prefill_speed(file: Path = PREFILL) -> PrefillSpeed | None:
    """The measured times in a file; None where this copy of tokencomp has none."""
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    ratios = sorted({line["ratio"] for line in lines})
    known: dict[tuple[str, str, int, str], dict[float, float]] = {}
    for r in lines:
        case = (r["model"], kind_of(r), r["visual_tokens"], method_of(r))
        known.setdefault(case, {})[r["ratio"]] = r["speedup"]
    rows = [(*case, [by_ratio.get(ratio) for ratio in ratios]) for case, by_ratio in known.items()]
    facts = lines[-1]["environment"]
    hardware = facts["hardware"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['threads']} threads"
    dates = " and ".join(sorted({line["environment"]["date"][:10] for line in lines}))
    where = (
        f"{device}, {lines[-1]['dtype']}, random weights, without the vision tower; torch "
        f"{facts['versions']['torch']}, {dates}; benchmarks/models/prefill.md."
    )
    return PrefillSpeed(ratios, rows, where)
