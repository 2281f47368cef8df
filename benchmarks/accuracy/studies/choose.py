"""Choose the default reducer on the validation split.

python -m benchmarks.accuracy.studies.choose            # runs what is missing → choice.md
python -m benchmarks.accuracy.studies.choose --merging  # the same for the tables with merging
python -m benchmarks.accuracy.studies.choose --steps    # what benchmarks.long adds for videos
python -m benchmarks.accuracy.studies.choose --report   # from the stored results

The rule, its history and the reasons are in docs/decisions/0001-default-reducer.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.accuracy.report import page_folder, table
from benchmarks.accuracy.run import MODELS, answer_all
from benchmarks.accuracy.store import RESULTS, OneKind, Results, as_results, read_all
from benchmarks.accuracy.studies.ranking import (
    Candidate,
    answered,
    by_modality,
    by_ratio,
    choice_records,
    choice_table,
    compare,
    keys,
    rank,
    settings,
    title,
)
from benchmarks.experiment import Files, write
from benchmarks.long.answers import STEPS
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import MERGE, Setting
from tokencomp.zoo.shapesqa.items import FRAMES
from tokencomp.zoo.shapesqa.questions import FAMILIES

INTRO = """Validation questions of ShapesQA and of the [photographs](../real/README.md). Cells:
accuracy kept on images or videos at a ratio, over the families that a model has learned, mean over
the models. Score: mean over all cells, ratio 0.95 included. Tied: the paired 95 % interval of the
difference to the best includes 0. To spare: points above the bar (97 % at 0.5 and 0.75, 94 % at
0.9, 80 % at 0.95) in the candidate's worst cell. Of the tied candidates, the one with most points
to spare is chosen. [Rule and history](../../docs/decisions/0001-default-reducer.md). [All cells,
by model](../README.md#tables-as-csv). [Methods](METHODS.md)."""

WITH_MERGING = """Every other token is merged into the most similar kept one, with weights. `condiv
merge_rest=-1.0, proportional_attention=True` is how release 0.1 wrote `condiv merge=True`; without
the second option, merged tokens have no weights. The [decision
record](../../docs/decisions/0001-default-reducer.md) says why the default merges on images up to
0.9 only."""

LATER = """Only short answers are asked here. [Long answers](../long/choice.md) have replaced
`condiv` on videos by `kcenter` with merging on 2026-12-02."""

OTHERS = """These models took no part in the choice: tiny-gemma3 takes no videos, the first layer
of tiny-qwen3-5 has no attention to score with, and the other two are newer."""

VIDEOS: Candidate = ("condiv", {"power": 1.0, "margin": 0.2})
IMAGES: Candidate = ("condiv", {"power": 0.35, "margin": 0.2})
PREVIOUS = by_modality(IMAGES, VIDEOS)  # the default before, which stays where candidates are equal
CANDIDATES: list[Candidate] = [
    *(("condiv", {"power": p, "margin": 0.2}) for p in (0.35, 0.5, 1.0)),
    ("condiv", {"power": 0.5, "margin": 0.5}),
    *(by_modality(images, VIDEOS) for images in (IMAGES, ("kcenter", {}), ("bipartite", {}))),
    ("cdpruner", {"relevance": "attention"}),
    *((name, {}) for name in ("divprune", "kcenter", "bipartite", "random", "uniform")),
]
UNWEIGHTED: Candidate = ("condiv", {"merge_rest": -1.0})
WEIGHTED: Candidate = ("condiv", {"merge_rest": -1.0, "proportional_attention": True})
"""The default with `merge=True`, as release 0.1 wrote it; stored results, never run again."""
MERGED = [two for one in (UNWEIGHTED, WEIGHTED) for two in (by_modality(one, VIDEOS), one)]
MERGING: list[Candidate] = [
    ("kcenter", {}),
    ("kcenter", {MERGE: True}),
    ("scope", {"saliency": "none"}),
    ("scope", {"saliency": "none", MERGE: True}),
]
"""Need neither training nor attention of the decoder; `kcenter` is the default on images."""
LOCATION: Candidate = ("scope", {"saliency": "none", MERGE: True})
ASKED = [
    *MERGING,
    ("selector", {"pick": "mmr"}),
    ("selector", {"pick": "mmr", MERGE: True}),
]
"""What `--merging` asks; with what is stored already it makes a table."""
AGAINST = [
    *(by_modality(one, VIDEOS) for one in (WEIGHTED, LOCATION)),
    by_modality(LOCATION, WEIGHTED),
    WEIGHTED,
    *ASKED,
]
FORMER = "real-fastvlm"
"""A model of photographs that is not asked any more."""
LEFT_OUT = ("tiny-gemma3", "tiny-qwen3-5", "tiny-qwen3-vl-hard", "real-fastvlm-448")
"""Models that take no part in the choice, and which `--merging` asks about merging alone."""
SCORED: list[Candidate] = [VIDEOS, ("condiv", {**VIDEOS[1], MERGE: True})]
"""Asked of those of them that have attention in their first layer."""
QUESTION_FAMILIES = (
    "attribute", "existence", "count", "small_object", "needle", "video_existence", "action_count",
)  # fmt: skip


def evidence(folder: Path) -> list[Results]:
    """Validation results of the models in a folder, and of photographs."""
    asked = {FORMER: "candidates", f"{FORMER}-448": "merging"}
    return [*read_all(folder, "validation"), *(photographs(*one) for one in asked.items())]


def photographs(model: str, name: str) -> OneKind:
    """Stored answers about photographs."""
    stored = publishing.read(publishing.FOLDER / "real" / f"{name}.json")
    return as_results(stored, model, stored["environment"])


def files(folder: Path = RESULTS) -> Files:
    """The page, its data, and the choice, from the results of a folder.

    Models that have not answered for any candidate at every ratio take no part.
    """
    results, folder = evidence(folder), page_folder(folder.resolve())
    every = [one for one in results if any(answered([one], c) for c in CANDIDATES)]
    others = [one for one in every if one.manifest["model"] in LEFT_OUT]
    results = [one for one in every if one not in others]
    ready = [c for c in CANDIDATES if answered(results, c)]
    rows = rank(results, ready)
    chosen = max((r for r in rows if r["tied"]), key=preference)
    cells = [[results[i].manifest["model"], ratio, kind] for i, ratio, kind in keys(results)]
    data = json.dumps({"chosen": chosen, "cells": cells, "candidates": rows})
    short = json.loads(data, parse_float=lambda text: round(float(text), 6))
    waiting = [title(c) for c in CANDIDATES if c not in ready]
    default: Candidate = (chosen["reducer"], chosen["options"])
    of_others = [by_modality(one, VIDEOS) for one in MERGING] + SCORED
    groups = [
        *(ranked(results, [default, *more]) for more in (MERGED, AGAINST)),
        *(ranked(others, more) for more in (MERGING, of_others)),
    ]
    merging = [one.text for one in groups[:2] if one]
    later = [one.text for one in groups[2:] if one]
    parts = [
        "# Why is kcenter the default on images, and why was condiv on videos?",
        "`python -m benchmarks.accuracy.studies.choose`",
        f"Chosen: **{title(default)}**.",
        LATER,
        *([f"Without results yet: {'; '.join(waiting)}."] if waiting else []),
        choice_table(rows, default, results),
        INTRO,
        "## Candidates with merging",
        WITH_MERGING,
        *merging,
        "## Merging on four more models",
        OTHERS,
        *later,
        *over_all(results, others),
        "## Runs",
        "\n".join(f"- {about(one)}" for one in [*results, *others]),
    ]
    records = choice_records("candidates", rows, results)
    records += [row for one in groups if one for row in one.records]
    return {
        folder / "choice.md": "\n\n".join(parts) + "\n",
        folder / "choice.csv": publishing.csv_text(records),
        folder / "choice.json": publishing.dense(short) + "\n",
    }


def about(one: Results) -> str:
    """What a model was asked, and by which code."""
    learned = ", ".join(one.learned)
    runs = publishing.commits(one.manifest["runs"])
    return (
        f"{one.manifest['model']}: {one.manifest['items']} questions, learned: {learned}. {runs}."
    )


@dataclass(frozen=True)
class Ranked:
    """A table for the page, and its rows for the CSV file."""

    text: str
    records: list[dict[str, Any]]


def ranked(results: list[Results], candidates: list[Candidate]) -> Ranked | None:
    """Candidates, of which the first is the default, on the models that have answered for all."""
    ready = [one for one in results if all(answered([one], c) for c in candidates)]
    if not ready:
        return None
    rows = rank(ready, candidates)
    names = ", ".join(one.manifest["model"] for one in ready)
    parts = [f"{names}:", choice_table(rows, candidates[0], ready)]
    text = "\n\n".join([*parts, *by_the_rule(rows, candidates[0])])
    return Ranked(text, choice_records(names, rows, ready))


def over_all(results: list[Results], others: list[Results]) -> list[str]:
    """Dropping and merging on images, over all models, and over those that still exist."""
    present = [one for one in results if one.manifest["model"] != FORMER]
    every = {"all": results, "all but the former model of photographs": present}
    rows = [
        row
        for what, some in every.items()
        for limited in (False, True)
        for row in against_merging(what, some, others, limited)
    ]
    head = ["models", "cells", "merging in images", "score, merging", "score, dropping",
            "difference (95 %)", "to spare, merging", "to spare, dropping"]  # fmt: skip
    return [table(head, rows)] if rows else []


def against_merging(
    what: str, results: list[Results], others: list[Results], limited: bool
) -> list[list[str]]:
    """Dropping against merging on images; `limited`: up to 0.9 alone."""
    dropping, merging = MERGING[:2]
    default, scored = by_modality(dropping, VIDEOS), [r for r in others if answered([r], VIDEOS)]

    def images(merged: Candidate) -> Candidate:
        return by_ratio(merged, dropping) if limited else merged

    groups = [
        (results, default, by_modality(images(WEIGHTED), VIDEOS)),
        (scored, default, by_modality(images(merging), VIDEOS)),
        ([r for r in others if r not in scored], dropping, by_modality(images(merging), dropping)),
    ]
    if not others or not all(answered(some, one) for some, *pair in groups for one in pair):
        return []
    found = compare(groups)
    (dropped, merged), (low, high) = found["scores"], found["difference"]
    spare = [f"{100 * value:+.1f}" for value in reversed(found["spare"])]
    count = f"{found['cells']} of {len(results) + len(others)} models"
    where = "up to 0.9" if limited else "at every ratio"
    scores = [f"{merged:.1%}", f"{dropped:.1%}", f"[{low:+.1%}, {high:+.1%}]"]
    return [[what, count, where, *scores, *spare]]


def by_the_rule(rows: list[dict[str, Any]], default: Candidate) -> list[str]:
    """What the rule alone would choose, if it is another one."""
    best = max((row for row in rows if row["tied"]), key=lambda row: preference(row, default))
    name: Candidate = (best["reducer"], best["options"])
    return [] if name == default else [f"By the rule alone: **{title(name)}**."]


def preference(row: dict[str, Any], previous: Candidate = PREVIOUS) -> tuple[float, bool, float]:
    """Order of tied candidates: points to spare, then the previous default, then the score."""
    return row["spare"], (row["reducer"], row["options"]) == previous, row["score"]


def missing(folder: Path, candidates: list[Candidate]) -> list[Setting]:
    """Settings without results, and the full model, whose answers identify the model.

    Settings whose method has changed since their run count as missing.
    """
    stored = (folder / "validation.json").exists()
    known = Results.read(folder, "validation").settings if stored else {}
    every = [s for candidate in candidates for s in settings(candidate)]
    grid = [s for s in every if known.get(s.label, {}).get("method", s.method) != s.method]
    grid += [s for s in every if s.label not in known]
    return [Setting(), *grid] if grid else []


def run_missing(
    doc: str,
    asked: Callable[[argparse.Namespace, str], list[Candidate]],
    per_family: int,
    families: tuple[str, ...],
    out: Path,
) -> Path:
    """Run on every model what it is `asked` and has no results; returns their folder."""
    parser = publishing.parser(doc, out)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--per-family", type=int, default=per_family)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(families))
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--merging", action="store_true", help="what the last tables compare")
    parser.add_argument("--steps", action="store_true", help="the candidate for videos with steps")
    parser.set_defaults(start=0, difficulty="usual", frames=FRAMES)
    args = parser.parse_args()
    if args.report:
        return Path(args.out)
    facts = publishing.published_from(args.out, args.allow_dirty)
    torch.set_num_threads(args.threads)
    for name in args.models:
        if grid := missing(args.out / name, asked(args, name)):
            answer_all(name, "validation", grid, args, facts)
    return Path(args.out)


def asked(args: argparse.Namespace, model: str) -> list[Candidate]:
    """What a model is asked: the first layer of tiny-qwen3-5 has no attention to score with."""
    if args.steps:
        return [STEPS] if model != "tiny-gemma3" else []  # which takes no videos
    if not args.merging:
        return CANDIDATES
    if model not in LEFT_OUT:
        return ASKED
    return [*MERGING, *(SCORED if model != "tiny-qwen3-5" else ())]


def main() -> None:
    write(files(run_missing(str(__doc__), asked, 40, QUESTION_FAMILIES, RESULTS)))


if __name__ == "__main__":
    with one_message():
        main()
