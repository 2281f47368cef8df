"""Ask a model for long answers under every setting, and store what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.run import tower_once, usable, watches_tower
from benchmarks.long.settings import KINDS, RATIOS, methods
from benchmarks.long.stored import Answers
from benchmarks.publishing import environment
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import Setting
from tokencomp.zoo.shapesqa.examples import long_examples
from tokencomp.zoo.shapesqa.long_scenes import LongItem, item

LONGEST = 224
"""Tokens of an answer; the longest of a reference has about 200."""


def items_of(kind: str, split: str, per_family: int) -> list[LongItem]:
    """Items of a kind of media, family by family."""
    return [item(split, family, k) for family in KINDS[kind] for k in range(per_family)]


def ask(
    model: Any,
    processor: Any,
    items: Sequence[LongItem],
    settings: Sequence[Setting],
    folder: Path,
    batch: int,
) -> dict[Setting, EvalRun]:
    """Answers under every setting that the model takes; stopped runs go on."""
    settings, refused = usable(model, settings)
    for label, why in refused.items():
        print(f"not asked: {label}: {why}", flush=True)
    groups = [[s for s in settings if watches_tower(s) is watches] for watches in (False, True)]
    examples = long_examples(items)
    how: dict[str, Any] = {"batch_size": batch, "max_new_tokens": LONGEST}
    with tower_once(model):
        runs = sweep(model, processor, examples, groups[0], folder, **how)
    if groups[1]:
        runs |= sweep(model, processor, examples, groups[1], folder, **how)
    return runs


def add_answers(
    stored: Answers,
    loaded: tuple[Any, Any],
    kind: str,
    items: Sequence[LongItem],
    folder: Path,
    batch: int,
    facts: dict[str, Any],
    only: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
) -> None:
    """Ask all settings of a kind of media, or those of some methods, and add the answers."""
    wanted = [s for s in methods(kind, ratios) if not only or s.off or s.reducer in only]
    runs = ask(*loaded, items, wanted, folder, batch)
    ids = [one.id for one in items]
    texts, reached = {}, {}
    for setting, run in runs.items():
        said = {record["id"]: record["prediction"] for record in run.answered}
        texts[setting.label] = [said[name] for name in ids]
        reached[setting.label] = round(float(run.summary().get("achieved_ratio", 0.0)), 4)
    stored.add(kind, ids, texts, reached, {**environment(), **facts})
