"""What k-center compares before the vision tower: chosen on validation questions.

    python -m benchmarks.accuracy.studies.tower_distance      # about five minutes of one core

writes tower_distance.json; `python -m benchmarks.accuracy.studies.tower --report` puts the table at
the end of its page. The questions are validation questions of the families of the study's sets.

k-center covers a cell by another one that looks like it. Averages of pixels make letters look like
the plain surface around them, and a thing that blinks looks the same each time. The rows of the
table add the contrast that averages hide, and the change within a cell, with other weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.tower import SETS, Questions
from benchmarks.accuracy.studies.tower_book import DISTANCE
from benchmarks.accuracy.studies.tower_page import ENTRY, RATIO
from benchmarks.publishing import environment
from tokencomp import make_reducer
from tokencomp.cli import one_message
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting

WEIGHTS = ((0.0, 0.0), (1.0, 1.0), (2.0, 1.0))
"""Of contrast and change."""
TOWER = (0.5, 0.75)
PER_FAMILY = {"qwen3-images": 60, "qwen3-videos": 40}
OTHERS = 30


def settings() -> dict[str, Setting]:
    """Rows of the table: "CONTRAST, CHANGE@TOWER RATIO"."""
    rows = {"entry only@0": Setting(ENTRY, RATIO)}
    for tower in TOWER:
        for contrast, change in WEIGHTS:
            reducer = make_reducer("kcenter", std_weight=contrast, temporal_weight=change)
            key = f"{contrast:g}, {change:g}@{tower:g}"
            options = {"tower_ratio": tower, "tower_reducer": reducer}
            rows[key] = Setting(ENTRY, RATIO, options, name=key)
    return rows


def run_set(name: str, args: argparse.Namespace, path: Path) -> None:
    """Answer all rows of a set, and add them to the file."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    count = args.per_family or PER_FAMILY.get(name, OTHERS)
    own = argparse.Namespace(split="validation", per_family=count, batch=args.batch)
    questions, rows = Questions(name, own), settings()
    runs = sweep(
        questions.model, questions.processor, questions.source, list(rows.values()),
        **questions.options,
    )  # fmt: skip
    answers = PackedAnswers.of({key: runs[setting] for key, setting in rows.items()}, None)
    stored: dict[str, Any] = publishing.read(path) if path.exists() else {"sets": {}}
    stored["sets"][name] = {
        **{fact: questions.facts[fact] for fact in ("model", "weights", "split")},
        "provenance": {**environment(), **facts}, "answers": answers.to_json(),
    }  # fmt: skip
    publishing.write(path, stored)


def main() -> None:
    parser = publishing.parser(__doc__, ACCURACY, "--output", report=False)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--per-family", type=int, help="questions per family")
    parser.add_argument("--batch", type=int, default=30)
    args = parser.parse_args()
    for name in args.sets:
        run_set(name, args, args.output / DISTANCE)


if __name__ == "__main__":
    with one_message():
        main()
