"""Accuracy of the settings: answers of the embedded Qwen3-VL to ShapesQA, by modality and split."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.tower import DEEP_IMAGES, DEEP_VIDEOS
from benchmarks.frontier.grid import Point
from benchmarks.publishing import environment
from tokencomp.evaluation.runner import sweep
from tokencomp.inputs.loading import load_model
from tokencomp.trained.cards import weights_hash
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

MODEL = "tiny-qwen3-vl"
FAMILIES = {"image": DEEP_IMAGES, "video": DEEP_VIDEOS}
AT_ONCE = 6
"""Settings that are answered and stored together."""


def read(path: Path) -> dict[str, Any]:
    """Stored entries by "MODALITY, SPLIT"; `answers` is `PackedAnswers`."""
    if not path.exists():
        return {}
    entries: dict[str, Any] = json.loads(path.read_text())
    return {
        name: {**entry, "answers": PackedAnswers.from_json(entry["answers"])}
        for name, entry in entries.items()
    }


def write(path: Path, entries: dict[str, Any]) -> None:
    """Store the entries; answers in packed form."""
    packed = {name: {**e, "answers": e["answers"].to_json()} for name, e in entries.items()}
    publishing.write(path, packed)


def answer(modality: str, points: Sequence[Point], args: argparse.Namespace, path: Path) -> None:
    """Answer the questions under every setting that the file lacks."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    entries, name = read(path), f"{modality}, {args.split}"
    model, processor = load_model(MODEL, device="cpu")
    blocks = model.config.vision_config.depth
    chosen = list(items(args.split, args.per_family, FAMILIES[modality]))
    source = shapesqa(chosen, ACCURACY / "results" / "media" / args.split)
    done = entries[name]["answers"].correct if name in entries else {}
    missing = [p for p in points if p.key not in done]
    for first in range(0, len(missing), AT_ONCE):
        some = missing[first : first + AT_ONCE]
        settings = [p.setting(blocks) for p in some]
        runs = sweep(
            model,
            processor,
            source,
            settings,
            None,
            batch_size=args.batch,
            progress=name,
            name=MODEL,
        )
        keyed = {p.key: runs[s] for p, s in zip(some, settings, strict=True)}
        failed = [f"{key}: {run.failed[0]}" for key, run in keyed.items() if run.failed]
        if failed:
            raise SystemExit("\n".join(failed))
        new = PackedAnswers.of(keyed, None)
        before = entries.get(name)
        entries[name] = {
            "model": MODEL, "weights": weights_hash(model),
            "provenance": {**facts, **environment()},
            "answers": before["answers"].joined(new) if before else new,
        }  # fmt: skip
        write(path, entries)
