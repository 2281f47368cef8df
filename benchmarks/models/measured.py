"""How much faster the default makes the LLM prefill on the shapes of real models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.method import DEFAULT_REDUCER

PREFILL = Path(__file__).with_name("prefill.jsonl")


@dataclass(frozen=True)
class PrefillSpeed:
    """How many times as fast the LLM prefill is with compression, a column per ratio.

    A row has the name of a shape, the modality, visual tokens, the method, and one value per
    ratio (None: not measured).
    """

    ratios: list[float]
    rows: list[tuple[str, str, int, str, list[float | None]]]


def kind_of(record: Mapping[str, Any]) -> str:
    """The media of a record; older ones are all of videos."""
    return record.get("kind", "video")


def method_of(record: Mapping[str, Any]) -> str:
    """The reducer as it was called when it was measured, and what differs from its default."""
    merge = record.get("merge", record.get("rest"))  # as older records say it
    dropped = record["reducer"] == DEFAULT_REDUCER and merge in (False, "drop")
    return record["reducer"] + (" merge=False" if dropped else "")


def prefill_speed() -> PrefillSpeed:
    """The stored times of the default reducer."""
    lines = [json.loads(line) for line in PREFILL.read_text(encoding="utf-8").splitlines()]
    lines = [r for r in lines if r["reducer"] == DEFAULT_REDUCER]
    ratios = sorted({line["ratio"] for line in lines})
    known: dict[tuple[str, str, int, str], dict[float, float]] = {}
    for r in lines:
        case = (r["model"], kind_of(r), r["visual_tokens"], method_of(r))
        known.setdefault(case, {})[r["ratio"]] = r["speedup"]
    rows = [(*case, [by_ratio.get(ratio) for ratio in ratios]) for case, by_ratio in known.items()]
    return PrefillSpeed(ratios, rows)
