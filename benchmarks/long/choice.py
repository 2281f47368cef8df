"""The rule of decision 1 for the default on videos, with long answers as cells.

    python -m benchmarks.long choice              # → choice.md, choice.json

The cells of short answers are those of `benchmarks.accuracy.studies.choose`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.store import RESULTS
from benchmarks.accuracy.studies import ranking
from benchmarks.accuracy.studies.choose import SCORED, VIDEOS, WEIGHTED, evidence
from benchmarks.accuracy.studies.ranking import Candidate, by_modality, by_ratio
from benchmarks.experiment import Files
from benchmarks.long.answers import CHOICE_RATIOS, KINDS, STEPS, Answers, Group, path_of
from benchmarks.publishing import csv_text, dense, provenance, table
from tokencomp.evaluation.settings import FULL, MERGE

SPLIT, MODEL = "validation", "tiny-qwen3-vl-long"
CELLS = {"images": "images", "clips": "videos"}
"""Kinds of media as cells of short answers name them."""
KCENTER: Candidate = ("kcenter", {})
MERGED: Candidate = ("kcenter", {MERGE: True})
STEPS_TO = "kcenter with steps up to 0.9, merged"
PREVIOUS = "condiv"
"""The default on videos before."""
OLD, SCORED_FIRST, UNSCORED, LONG = "release 0.1", "scored", "unscored", "long"
"""How the stored answers of a model name their settings; without attention in its first layer, the
default on videos was kcenter."""


@dataclass(frozen=True)
class LongResults:
    """Stored long answers in the form that `ranking` reads: a share of facts per question."""

    manifest: dict[str, Any]
    groups: dict[str, Group]
    learned: tuple[str, ...] = ()

    @property
    def settings(self) -> set[str]:
        return set.union(*({*group.texts} for group in self.groups.values()))

    def select(self, kind: str, families: Iterable[str] | None = None) -> list[int]:
        return [*range(len(self.groups[kind].items))] if kind in self.groups else []

    def scores(self, label: str, kind: str, families: Iterable[str] | None = None) -> list[float]:
        return [float(np.mean(one.kept)) for one in self.groups[kind].compared(label)]


def long_results(folder: Path) -> tuple[LongResults, list[dict[str, Any]]]:
    """Answers to the validation questions, and their provenance."""
    groups, about = {}, []
    for kind in KINDS:
        if (path := path_of(folder, SPLIT, kind)).exists():
            answers = Answers.read(path)
            groups[CELLS[kind]] = Group.of(answers, kind)
            about += answers.about
    return LongResults({"model": MODEL}, groups), about


def on_videos(names: str) -> dict[str, Candidate]:
    """What every candidate is called among the stored answers of a model."""
    dropped, merged = {
        OLD: (VIDEOS, WEIGHTED),
        SCORED_FIRST: (VIDEOS, SCORED[1]),
        UNSCORED: (KCENTER, MERGED),
        LONG: (("condiv", {}), ("condiv", {MERGE: True})),
    }[names]
    return {
        PREVIOUS: dropped,
        "condiv, merged": merged,
        "condiv, merged up to 0.9": by_ratio(merged, dropped),
        "kcenter": KCENTER,
        "kcenter, merged": MERGED,
        "kcenter with steps, merged": STEPS,
        STEPS_TO: by_ratio(STEPS, MERGED),
        "kcenter, merged up to 0.9": by_ratio(MERGED, KCENTER),
        "kcenter, merged up to 0.9, condiv above": by_ratio(MERGED, dropped),
    }


CANDIDATES = tuple(on_videos(LONG))


def whole(candidate: str, names: str) -> Candidate:
    """A candidate for videos, with the default on images."""
    images = by_ratio(WEIGHTED if names == OLD else MERGED, KCENTER)
    return by_modality(images, on_videos(names)[candidate])


def models(folder: Path) -> list[tuple[Any, str]]:
    """Models that have answered for every candidate, and how they name their settings."""
    found: list[tuple[Any, str]] = []
    for one in evidence(RESULTS):
        for names in (OLD, SCORED_FIRST, UNSCORED):
            if all(ranking.answered([one], whole(c, names)) for c in CANDIDATES):
                found.append((one, names))
                break
    return [*found, (long_results(folder)[0], LONG)]


def rank(found: list[tuple[Any, str]]) -> list[dict[str, Any]]:
    """Candidates by score, as `ranking.rank`, over models that name settings differently."""
    groups = [([one], [whole(c, names) for c in CANDIDATES]) for one, names in found]
    standing = ranking.standing(groups)
    best, rows = max((means for means, *_ in standing), key=lambda means: means[0]), []
    for name, (means, cells, spare) in zip(CANDIDATES, standing, strict=True):
        low, high = ranking.interval(means, best)
        row = {"candidate": name, "score": float(means[0]), "low": low, "high": high}
        rows.append({**row, "tied": high >= 0, "cells": cells, "spare": spare})
    return sorted(rows, key=lambda row: -row["score"])


def chosen(rows: list[dict[str, Any]]) -> str:
    """Of the tied candidates the one with most to spare, then the previous default."""
    tied = [row for row in rows if row["tied"]]
    best = max(tied, key=lambda r: (r["spare"], r["candidate"] == PREVIOUS, r["score"]))
    return str(best["candidate"])


def files(folder: Path) -> Files:
    """The page, its data, and what is chosen for images and videos."""
    found, about = models(folder), long_results(folder)[1]
    columns = [
        (one.manifest["model"], kind, ratio)
        for one, _ in found
        for _, ratio, kind in ranking.keys([one])
    ]
    rows, short = rank(found), rank(found[:-1])
    clips = found[-1][0].groups["videos"]
    name = chosen(rows)
    parts = [
        HEAD.format(chosen=name),
        _table(rows, columns, name),
        f"By the cells of short answers alone, the rule names **{chosen(short)}**.",
        MEANING.format(items=len(clips.items), right=clips.shares([FULL])["right"]),
        "## Provenance",
        "\n".join(f"- {provenance(one)}" for one in about),
    ]
    records = [
        {
            **{k: v for k, v in row.items() if k != "cells"},
            **{"_".join(map(str, c)): v for c, v in zip(columns, row["cells"], strict=True)},
        }
        for row in rows
    ]
    reducer, options = whole(name, LONG)
    stored = {"chosen": {"reducer": reducer, "options": options}}
    return {
        folder / "choice.md": "\n\n".join(parts) + "\n",
        folder / "choice.csv": csv_text(records),
        folder / "choice.json": dense(stored) + "\n",
    }


def _table(rows: list[dict[str, Any]], columns: list[tuple[str, str, float]], name: str) -> str:
    head = ["on videos", "score", "difference to best (95 %)", "to spare"]
    parts = [(what, ratio) for what in ("short", "long") for ratio in CHOICE_RATIOS]
    lines = []
    for row in rows:
        cells = []
        for what, ratio in parts:
            held = [
                v
                for v, (model, kind, at) in zip(row["cells"], columns, strict=True)
                if kind == "videos" and at == ratio and (model == MODEL) is (what == "long")
            ]
            cells.append(f"{np.mean(held):.1%}")
        difference = f"[{row['low']:+.1%}, {row['high']:+.1%}]" + " tied" * row["tied"]
        label = f"**{row['candidate']}**" if row["candidate"] == name else row["candidate"]
        spare = f"{100 * row['spare']:+.1f}"
        lines.append([label, f"{row['score']:.1%}", difference, spare, *cells])
    return table([*head, *(f"{what} {ratio}" for what, ratio in parts)], lines)


HEAD = """# Which default on videos, with long answers?

`python -m benchmarks.long choice`, by the rule of [decision
1](../../docs/decisions/0001-default-reducer.md), from stored answers to validation questions.

Chosen: **{chosen}**."""
MEANING = """On images every candidate is the default. Cells: accuracy that short answers about
videos keep, mean over the models ([candidates](../accuracy/choice.md)), and facts that long answers
about [clips](README.md) keep, of one model ({items} questions, {right:.1%} of their facts right
without compression). Score: mean over all cells of all models, images included; every cell has the
same weight. Tied: the paired 95 % interval of the difference to the best includes 0. To spare:
points above the bar (97 % at 0.5 and 0.75, 94 % at 0.9, 80 % at 0.95) in the candidate's worst
cell."""
