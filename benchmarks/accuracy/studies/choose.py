"""Choose the default reducer on the validation split.

python -m benchmarks.accuracy.studies.choose            # runs what is missing → choice.md
python -m benchmarks.accuracy.studies.choose --report   # from the stored results

The rule, its history and the reasons are in docs/decisions/0001-default-reducer.md.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.accuracy.report import learned_sentence, page_folder, sources
from benchmarks.accuracy.run import RATIOS, answer_all
from benchmarks.accuracy.store import KINDS, RESULTS, Results, read_all
from benchmarks.accuracy.studies.ranking import (
    BY_KIND,
    Candidate,
    answered,
    by_kind,
    keys,
    rank,
    runs,
    settings,
)
from benchmarks.accuracy.tables import table
from benchmarks.real.candidates import CANDIDATES as SERVED
from benchmarks.real.candidates import RESULTS as MERGING
from benchmarks.real.candidates import photographs
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import REST, Setting
from tokencomp.shapesqa.items import FRAMES
from tokencomp.shapesqa.questions import FAMILIES
from tokencomp.storage import write_text
from tokencomp.zoo import available_models

INTRO = """Every candidate for the default reducer on the validation splits of ShapesQA and of the
[photographs](../real/README.md). Cells: retention on images or videos at a ratio, over the question
families that a model has learned, mean over the models. Score: mean over all cells. Tied: the
paired 95 % interval of the difference to the best includes 0. To spare: points above the bar in the
cell where the candidate has least; of the tied candidates, the one with most to spare is chosen.
The [decision record](../../docs/decisions/0001-default-reducer.md) explains the rule and how it
came about; [methods](METHODS.md) explains the rest."""

BEYOND = """The same tokens are kept, and every other token is merged into the one that it
resembles most, on images or on all media. `merge_rest` and `proportional_attention`, the power of
the number of merged tokens with which their mean counts in attention, were options of release 0.1;
of their forms `rest="merge"` is `merge_rest=-1.0, proportional_attention=True`. These candidates
are not for the default: they do not equal masking."""

AGAIN = """`rest="merge"` has since become an option of every reducer. Asked with it, on the
embedded models alone (the model of photographs was not at hand): the default, a k-centre on all
media, facility location (`scope` with `saliency="none"`), and marginal relevance on the trained
selector. "condiv merge_rest=-1.0,
proportional_attention=True" is the default with `rest="merge"`. The [decision
record](../../docs/decisions/0001-default-reducer.md) says what followed."""

OTHERS = """Three models take no part in the choice: tiny-gemma3 sees images alone, the first layer
of tiny-qwen3-5 has no attention to score with, and real-fastvlm-448 came after it. They were asked
for what needs neither training nor attention of the decoder, and tiny-gemma3, which has attention,
for `condiv` too. On images `kcentre` is their default."""

VIDEOS: Candidate = ("condiv", {"power": 1.0, "margin": 0.2})
IMAGES: Candidate = ("condiv", {"power": 0.35, "margin": 0.2})
NORM: Candidate = ("condiv", {"power": 0.5, "margin": 0.1, "signal": "norm"})
PREVIOUS = by_kind(IMAGES, VIDEOS)
"""The default before this choice, which stays where candidates are equal."""
CANDIDATES: list[Candidate] = [  # some have options of release 0.1, see `ranking.runs`
    *(("condiv", {"power": p, "margin": 0.2}) for p in (0.35, 0.5, 1.0)),
    ("condiv", {"power": 0.5, "margin": 0.5}),
    ("condiv", {"power": "auto", "margin": 0.1}),
    ("condiv", {"power": 1.0, "margin": 0.1, "merge_rest": 0.8}),
    ("condiv", {"power": 0.0, "centred": True}),
    NORM,
    *(by_kind(images, VIDEOS) for images in (IMAGES, NORM, ("kcentre", {}), ("merge", {}))),
    ("cdpruner", {"relevance": "attention"}),
    ("divprune", {}),
    ("kcentre", {}),
    ("merge", {}),
    ("random", {}),
    ("uniform", {}),
]
MERGERS: list[Candidate] = [
    ("condiv", {"merge_rest": -1.0, **weight})
    for weight in ({}, *({"proportional_attention": share} for share in (0.25, 0.5, True)))
]
MERGED = [*(by_kind(one, VIDEOS) for one in MERGERS), *MERGERS]
"""The default of 0.1 with dropped tokens merged into kept ones: stored results, never run again.

They cannot be the default, which has to run on every model and to equal masking.
"""
WEIGHTED: Candidate = ("condiv", {"merge_rest": -1.0, "proportional_attention": True})
"""The default with `rest="merge"`, as release 0.1 wrote it."""
LOCATION: Candidate = ("scope", {"saliency": "none", REST: "merge"})
ASKED: list[Candidate] = [
    ("kcentre", {REST: "merge"}),
    ("scope", {"saliency": "none"}),
    LOCATION,
    ("selector", {"pick": "mmr"}),
    ("selector", {"pick": "mmr", REST: "merge"}),
]
"""What `studies.merging` asks; with what is stored already it makes a table."""
AGAINST = [
    *(by_kind(one, VIDEOS) for one in (WEIGHTED, LOCATION)),
    by_kind(LOCATION, WEIGHTED),
    WEIGHTED,
    ("kcentre", {}),
    *ASKED,
]
LEFT_OUT = ("tiny-gemma3", "tiny-qwen3-5", "real-fastvlm-448")
"""Models that take no part in the choice, and which `studies.merging` asks about merging alone."""
SCORED: list[Candidate] = [VIDEOS, ("condiv", {**VIDEOS[1], REST: "merge"})]
"""Asked of tiny-gemma3 too: the first layer of the tiny Qwen3.5 has no attention to score with."""
DIGITS = 6  # of the numbers in choice.json
QUESTION_FAMILIES = (
    "attribute", "existence", "count", "small_object", "needle", "video_existence", "action_count",
)  # fmt: skip


def title(candidate: Candidate) -> str:
    if candidate[0] == BY_KIND:
        return ", ".join(f"{title(part)} on {kind}" for kind, part in candidate[1].items())
    return f"{candidate[0]} {', '.join(f'{k}={v}' for k, v in candidate[1].items())}".strip()


def choice_table(rows: list[dict[str, Any]], chosen: dict[str, Any], results: list[Results]) -> str:
    columns = list(itertools.product(RATIOS, KINDS))
    cells = [(ratio, kind) for _, ratio, kind in keys(results)]
    head = ["candidate", "score", "difference to best (95 %)", "to spare"]
    body = []
    for r in rows:
        name, (low, high) = title((r["reducer"], r["options"])), r["difference"]
        body.append(
            [
                f"**{name}**" if r is chosen else name,
                f"{r['score']:.1%}",
                f"[{low:+.1%}, {high:+.1%}]" + (" tied" if r["tied"] else ""),
                f"{100 * r['spare']:+.2f}",
                *(mean_of(r["cells"], cells, column) for column in columns),
            ]
        )
    return table([*head, *(f"{kind} {ratio:g}" for ratio, kind in columns)], body)


def mean_of(values: list[float], cells: list[tuple[float, str]], column: tuple[float, str]) -> str:
    selected = [v for v, c in zip(values, cells, strict=True) if c == column]
    return f"{sum(selected) / len(selected):.1%}" if selected else "–"


def evidence(folder: Path) -> list[Results]:
    """Validation results of the models in a folder, and of photographs."""
    return [*read_all(folder, "validation"), photographs(), photographs(MERGING)]


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
    short = json.loads(data, parse_float=lambda text: round(float(text), DIGITS))
    publishing.write(folder / "choice.json", short)
    waiting = [title(c) for c in CANDIDATES if c not in ready]
    merged = [c for c in MERGED if answered(results, c)]
    default: Candidate = (chosen["reducer"], chosen["options"])
    beyond = rank(results, [default, *merged])
    parts = [
        "# Candidates for the default reducer",
        "Made by `python -m benchmarks.accuracy.studies.choose`.",
        INTRO,
        f"Chosen: **{title(default)}**.",
        *([f"Without results yet: {'; '.join(waiting)}."] if waiting else []),
        choice_table(rows, chosen, results),
        "## Beyond dropping",
        BEYOND,
        choice_table(beyond, beyond[0], results),
        *by_the_rule(beyond, default),
        *asked_again(results, default),
        *asked_of_others(others),
    ]
    for one in [*results, *others]:
        m = one.manifest
        parts += [f"## {m['model']}", f"{m['items']} questions. {learned_sentence(one)}"]
        parts.append(sources(one))
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "choice.md", text)
    return chosen


def by_the_rule(rows: list[dict[str, Any]], default: Candidate) -> list[str]:
    """What the rule would choose if merging could be the default."""
    best = max((row for row in rows if row["tied"]), key=lambda row: preference(row, default))
    name: Candidate = (best["reducer"], best["options"])
    record = "[decision record](../../docs/decisions/0001-default-reducer.md)"
    said = f"By the rule alone: **{title(name)}**. The {record} says why it is not the default."
    return [] if name == default else [said]


def asked_again(results: list[Results], default: Candidate) -> list[str]:
    """The section about merging, of the models that have answered for all of `ASKED`."""
    ready = [one for one in results if all(answered([one], c) for c in ASKED)]
    if not ready:
        return []
    rows = rank(ready, [default, *AGAINST])
    first = next(row for row in rows if (row["reducer"], row["options"]) == default)
    names = ", ".join(one.manifest["model"] for one in ready)
    return ["## Candidates with merging", AGAIN, f"Of {names}.", choice_table(rows, first, ready)]


def asked_of_others(results: list[Results]) -> list[str]:
    """The section of the models in `LEFT_OUT`: all together, then those that run condiv too."""
    default, parts = SERVED[0], []
    for candidates in (SERVED, [*SERVED, *SCORED]):
        ready = [one for one in results if all(answered([one], c) for c in candidates)]
        if ready:
            rows = rank(ready, candidates)
            first = next(row for row in rows if (row["reducer"], row["options"]) == default)
            names = ", ".join(one.manifest["model"] for one in ready)
            parts += [f"Of {names}.", choice_table(rows, first, ready)]
            parts += by_the_rule(rows, default)
    return ["## Merging on three more models", OTHERS, *parts] if parts else []


def preference(row: dict[str, Any], previous: Candidate = PREVIOUS) -> tuple[float, bool, float]:
    """Order of tied candidates: points to spare, then the previous default, then the score."""
    return row["spare"], (row["reducer"], row["options"]) == previous, row["score"]


def missing(folder: Path, candidates: list[Candidate]) -> list[Setting]:
    """Settings without results, and the full model, whose answers identify the model.

    Settings whose method has changed since their run count as missing.
    """
    stored = (folder / "validation.json").exists()
    known = Results.read(folder, "validation").settings if stored else {}
    every = [s for c in candidates if runs(c) for s in settings(c)]
    grid = [s for s in every if known.get(s.label, {}).get("method", s.method) != s.method]
    grid += [s for s in every if s.label not in known]
    return [Setting(), *grid] if grid else []


def run_missing(
    doc: str,
    candidates: list[Candidate] | Callable[[str], list[Candidate]],
    per_family: int,
    families: tuple[str, ...],
    out: Path,
) -> Path:
    """Run on every model what the command line names and has no results; returns their folder.

    The candidates are those of all models, or of the model that is given by name.
    """
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
        asked = candidates(name) if callable(candidates) else candidates
        grid = missing(args.out / name, asked)
        if grid:
            answer_all(name, "validation", grid, args, facts)
    return Path(args.out)


def main() -> None:
    folder = run_missing(str(__doc__), CANDIDATES, 40, QUESTION_FAMILIES, RESULTS)
    chosen = write_choice(evidence(folder), page_folder(folder.resolve()))
    print(f"chosen: {title((chosen['reducer'], chosen['options']))}")


if __name__ == "__main__":
    with one_message():
        main()
