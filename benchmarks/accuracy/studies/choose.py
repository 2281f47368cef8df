"""Choose the default reducer on the validation split.

python -m benchmarks.accuracy.studies.choose            # runs what is missing → choice.md
python -m benchmarks.accuracy.studies.choose --report   # from the stored results

The rule, its history and the reasons are in docs/decisions/0001-default-reducer.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.accuracy.report import learned_sentence, page_folder, sources
from benchmarks.accuracy.run import answer_all
from benchmarks.accuracy.store import RESULTS, Results, read_all
from benchmarks.accuracy.studies.ranking import (
    Candidate,
    answered,
    by_modality,
    by_ratio,
    choice_table,
    compare,
    keys,
    rank,
    settings,
    title,
)
from benchmarks.real import candidates as real
from benchmarks.stored import NOTE
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import MERGE, Setting
from tokencomp.storage import write_text
from tokencomp.zoo import available_models
from tokencomp.zoo.shapesqa.items import FRAMES
from tokencomp.zoo.shapesqa.questions import FAMILIES

INTRO = """Every candidate for the default reducer on the validation splits of ShapesQA and of the
[photographs](../real/README.md). Cells: retention on images or videos at a ratio, over the question
families that a model has learned, mean over the models. Score: mean over all cells. Tied: the
paired 95 % interval of the difference to the best includes 0. To spare: points above the bar in the
cell where the candidate has least; of the tied candidates, the one with most to spare is chosen.
The [decision record](../../docs/decisions/0001-default-reducer.md) explains the rule and how it
came about; [methods](METHODS.md) explains the rest."""

WITH_MERGING = """Every other token is merged into the kept one that it resembles most, which then
counts in attention as often as the tokens it stands for: `merge=True`, which release 0.1 wrote as
`merge_rest=-1.0, proportional_attention=True`; without the latter, means have no weights. First
come the default and merging on images or on all media. Then, of the embedded models alone (the
model of photographs was not at hand), a k-center on all media, facility location (`scope` with
`saliency="none"`), and marginal relevance on the trained selector. The [decision
record](../../docs/decisions/0001-default-reducer.md) says why none of them is the default, even
where the rule alone would choose it."""

OTHERS = """Four models take no part in the choice: tiny-gemma3 sees images alone, the first layer
of tiny-qwen3-5 has no attention to score with, and the others came after it. They were asked for
what needs neither training nor attention of the decoder; tiny-gemma3 and tiny-qwen3-vl-hard, which
have attention, for `condiv` too. On images `kcenter` is their default."""

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
LOCATION: Candidate = ("scope", {"saliency": "none", MERGE: True})
ASKED = [
    *real.CANDIDATES,
    ("selector", {"pick": "mmr"}),
    ("selector", {"pick": "mmr", MERGE: True}),
]
"""What `studies.merging` asks; with what is stored already it makes a table."""
AGAINST = [
    *(by_modality(one, VIDEOS) for one in (WEIGHTED, LOCATION)),
    by_modality(LOCATION, WEIGHTED),
    WEIGHTED,
    *ASKED,
]
LEFT_OUT = ("tiny-gemma3", "tiny-qwen3-5", "tiny-qwen3-vl-hard", "real-fastvlm-448")
"""Models that take no part in the choice, and which `studies.merging` asks about merging alone."""
SCORED: list[Candidate] = [VIDEOS, ("condiv", {**VIDEOS[1], MERGE: True})]
"""Asked of those of them that have attention in their first layer."""
QUESTION_FAMILIES = (
    "attribute", "existence", "count", "small_object", "needle", "video_existence", "action_count",
)  # fmt: skip


def evidence(folder: Path) -> list[Results]:
    """Validation results of the models in a folder, and of photographs."""
    return [*read_all(folder, "validation"), real.photographs(), real.photographs(real.RESULTS)]


def write_choice(results: list[Results], folder: Path) -> dict[str, Any]:
    """Write choice.md and choice.json; returns the chosen row.

    Models that have not answered for any candidate at every ratio take no part.
    """
    every = [one for one in results if any(answered([one], c) for c in CANDIDATES)]
    others = [one for one in every if one.manifest["model"] in LEFT_OUT]
    results = [one for one in every if one not in others]
    ready = [c for c in CANDIDATES if answered(results, c)]
    rows = rank(results, ready)
    chosen = max((r for r in rows if r["tied"]), key=preference)
    cells = [[results[i].manifest["model"], ratio, kind] for i, ratio, kind in keys(results)]
    data = json.dumps({"chosen": chosen, "cells": cells, "candidates": rows})
    short = json.loads(data, parse_float=lambda text: round(float(text), 6))
    publishing.write(folder / "choice.json", short)
    waiting = [title(c) for c in CANDIDATES if c not in ready]
    default: Candidate = (chosen["reducer"], chosen["options"])
    parts = [
        "# Candidates for the default reducer",
        "Made by `python -m benchmarks.accuracy.studies.choose`.",
        INTRO,
        NOTE,
        f"Chosen: **{title(default)}**.",
        *([f"Without results yet: {'; '.join(waiting)}."] if waiting else []),
        choice_table(rows, default, results),
        "## Candidates with merging",
        WITH_MERGING,
        *ranked(results, [default, *MERGED]),
        *ranked(results, [default, *AGAINST]),
        "## Merging on four more models",
        OTHERS,
        *ranked(others, real.CANDIDATES),
        *ranked(others, [by_modality(one, VIDEOS) for one in real.CANDIDATES] + SCORED),
        *over_all(results, others),
    ]
    for one in [*results, *others]:
        about = f"{one.manifest['items']} questions. {learned_sentence(one)}"
        parts += [f"## {one.manifest['model']}", about, sources(one)]
    write_text(folder / "choice.md", "\n\n".join(parts) + "\n")
    return chosen


def ranked(results: list[Results], candidates: list[Candidate]) -> list[str]:
    """Candidates, of which the first is the default, on the models that have answered for all."""
    ready = [one for one in results if all(answered([one], c) for c in candidates)]
    if not ready:
        return []
    rows = rank(ready, candidates)
    names = ", ".join(one.manifest["model"] for one in ready)
    table_of_all = choice_table(rows, candidates[0], ready)
    return [f"Of {names}.", table_of_all, *by_the_rule(rows, candidates[0])]


def over_all(results: list[Results], others: list[Results]) -> list[str]:
    """Dropping and merging on images, over all models, and over those that still exist."""
    present = [one for one in results if one.manifest["model"] != real.MODEL]
    every = {"all models": results, "the models without the former one of photographs": present}
    return [
        sentence
        for what, some in every.items()
        for limited in (False, True)
        for sentence in against_merging(what, some, others, limited)
    ]


def against_merging(
    what: str, results: list[Results], others: list[Results], limited: bool
) -> list[str]:
    """Dropping against merging on images; `limited`: up to 0.9 alone."""
    dropping, merging = real.CANDIDATES[:2]
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
    least = " and ".join(f"{-100 * value:.1f}" for value in found["spare"])
    where = "in images up to 0.9, and dropping above," if limited else "in images"
    return [
        f"Over {what} ({found['cells']} cells of {len(results) + len(others)} models) dropping "
        f"scores {dropped:.1%}, and merging {where} {merged:.1%} ({low:+.1%} to {high:+.1%}). In "
        f"the cell where each keeps least, they are {least} points below the bar."
    ]


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
    asked: Callable[[str], list[Candidate]],
    per_family: int,
    families: tuple[str, ...],
    out: Path,
) -> Path:
    """Run on every model what it is `asked` and has no results; returns their folder."""
    parser = publishing.parser(doc, out)
    parser.add_argument("--models", nargs="+", default=available_models())
    parser.add_argument("--per-family", type=int, default=per_family)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(families))
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(start=0, difficulty="usual", frames=FRAMES)
    args = parser.parse_args()
    if args.report:
        return Path(args.out)
    facts = publishing.published_from(args.out, args.allow_dirty)
    torch.set_num_threads(args.threads)
    for name in args.models:
        if grid := missing(args.out / name, asked(name)):
            answer_all(name, "validation", grid, args, facts)
    return Path(args.out)


def main() -> None:
    folder = run_missing(str(__doc__), lambda model: CANDIDATES, 40, QUESTION_FAMILIES, RESULTS)
    chosen = write_choice(evidence(folder), page_folder(folder.resolve()))
    print(f"chosen: {title((chosen['reducer'], chosen['options']))}")


if __name__ == "__main__":
    with one_message():
        main()
