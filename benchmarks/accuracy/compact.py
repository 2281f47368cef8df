"""The stored form of a sweep: what follows from something else, or is equal, is written once.

A file has the manifest of the sweep, then

shared
    Costs of a setting, or of one modality. Many settings cost the same, so that they name
    them by number.
settings
    By label; `answers` has the packed bits `correct` and `agrees`, from which it follows how many
    answers are right.
questions
    What was asked, see `benchmarks.accuracy.packed`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PARTS, unpack
from benchmarks.publishing import write

COSTS = ("achieved_ratio", "flops", "kv_bytes", "achieved")
COUNTED = ("items", "failed", "accuracy")  # of a setting: all are answered
USUAL = {"options": {}, "run": 0}  # of a setting, where it does not say


def write_sweep(path: Path, manifest: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
    """Write a sweep.

    Parameters
    ----------
    manifest
        See `Results`.
    answers
        `PackedAnswers.to_json()`.
    """
    shared: dict[str, int] = {}

    def number(value: Any) -> int:
        return shared.setdefault(json.dumps(value), len(shared))

    settings = {}
    for label, setting in manifest["settings"].items():
        kept = {k: v for k, v in setting.items() if k not in (*COSTS, *COUNTED)}
        kept = {k: v for k, v in kept.items() if k not in USUAL or v != USUAL[k]}
        if "work" in kept:
            kept["work"] = {kind: number(parts) for kind, parts in kept["work"].items()}
        kept["cost"] = number({k: setting[k] for k in COSTS if k in setting})
        settings[label] = {**kept, "answers": [answers[part][label] for part in PARTS]}
    content = {
        **manifest,
        "shared": [json.loads(text) for text in shared],
        "settings": settings,
        "questions": answers["questions"],
    }
    write(path, content)


def read_sweep(path: Path) -> dict[str, Any]:
    """The manifest of a sweep, with `answers` as `PackedAnswers.to_json` gives them."""
    stored = publishing.read(path)
    if "shared" not in stored:  # as older checkouts wrote them
        return stored
    shared, questions = stored.pop("shared"), stored.pop("questions")
    answers: dict[str, Any] = {"questions": questions, **{part: {} for part in PARTS}}
    for label, setting in stored["settings"].items():
        bits = dict(zip(PARTS, setting.pop("answers"), strict=True))
        for part, text in bits.items():
            answers[part][label] = text
        for name, value in USUAL.items():
            setting.setdefault(name, copy.copy(value))
        right = sum(unpack(bits["correct"], stored["items"]))
        setting |= {"items": stored["items"], "failed": 0, "accuracy": right / stored["items"]}
        setting |= shared[setting.pop("cost")]
        if "work" in setting:
            setting["work"] = {kind: shared[i] for kind, i in setting["work"].items()}
    return {**stored, "answers": answers}
