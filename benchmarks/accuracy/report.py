"""The pages of the accuracy benchmark, from its result files alone.

python -m benchmarks.accuracy.report    # → README.md
python -m benchmarks.accuracy.report --results benchmarks/accuracy/unseen

A page has the default, its variants, the baselines and the best other methods at three ratios. The
CSV file of a model has every method, ratio and question family.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.store import ACCURACY, LOST, MAIN, RESULTS, Results, read_all
from benchmarks.accuracy.tables import BASELINES, NONE, earlier, kept, record, table
from benchmarks.experiment import Files, write
from benchmarks.publishing import MARK, TABLES, csv_text, provenance
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import FULL, RANDOM

RATIOS = (0.5, 0.75, 0.9)
OTHERS = 8
"""Methods on a page, besides the default, its variants and the baselines."""
TRAINED = ("selector",)
TITLES = {
    "results": (
        "How much accuracy does each method keep?",
        "The first 60 test questions of every ShapesQA family, on the embedded models.",
    ),
    "unseen": (
        "How good is the default on questions that no choice was made on?",
        "Test questions 1500 to 1699 of every family that a model has learned. Nothing was chosen "
        "on them.",
    ),
    "counting": (
        "What happens to counting in models that have not learned to count?",
        "1500 test questions. The full models are less than 25 points above a blind guess.",
    ),
    "hard": (
        "What happens in hard scenes?",
        "Cameras pan, objects have the colours of their background, crowds are counted, and text "
        "is printed over textures. The scenes have their own seeds in every split.",
    ),
    "long": (
        "What happens on clips of 64 frames?",
        "All frames are seen. Questions are about events of single frames, their order, slow "
        "motion and repeated acts.",
    ),
}
NO_PAGE = "chance"
"""Results on families that a model has not learned: a part of baselines.md, with data here."""
COLUMNS = """Cells: accuracy with compression divided by accuracy without it, on the same questions,
images and videos together, over the question families that the model has learned (over all families
where it has learned none). Brackets: paired 95 % intervals. "–": not measured, or a baseline that
does not get down to the ratio. FLOPs: of the LLM's prefill, text included. `auto` in runs before
2026-12-02 is the default of that time: on videos `condiv`, which drops."""

Method = tuple[str, str]
"""Reducer, and its options as JSON."""


def methods(results: Results) -> dict[Method, dict[float, str]]:
    """Labels by method and ratio; every other method after the default, the best first."""
    labels: dict[Method, dict[float, str]] = {}
    for label, setting in results.settings.items():
        if setting["ratio"] in RATIOS:
            method = (setting["reducer"], json.dumps(setting["options"], sort_keys=True))
            labels.setdefault(method, {})[setting["ratio"]] = label
    groups: tuple[list[Method], ...] = ([], [], [])
    for method in labels:
        is_base = method[0] in BASELINES
        groups[0 if method[0] == results.default else 2 if is_base else 1].append(method)
    best: dict[str, Method] = {}  # the best options of a reducer
    for method in sorted(groups[1], key=lambda m: -right(results, labels[m])):
        best.setdefault(method[0], method)
    own = sorted(groups[0], key=lambda m: m[1] != "{}")
    bases = sorted(groups[2], key=lambda m: BASELINES.index(m[0]))
    return {m: labels[m] for m in (*own, *[*best.values()][:OTHERS], *bases)}


def known(results: Results) -> list[str] | None:
    """The learned families of these questions, which the table counts; None: all families."""
    return [family for family in results.learned if family in results.families] or None


def right(results: Results, labels: dict[float, str]) -> float:
    """Right answers of a method at all ratios; less than nothing where one is missing."""
    if len(labels) < len({*RATIOS} & {*results.ratios}):
        return -1
    return sum(sum(results.scores(k, "both", known(results))) for k in labels.values())


def line(results: Results, method: Method, labels: dict[float, str], ratios: Any) -> list[str]:
    """One method: its name, and its retention at every ratio."""
    reducer, options = method[0], json.loads(method[1])
    setting = results.settings[next(iter(labels.values()))]
    text = f"{reducer}{earlier(setting)} " + ", ".join(f"{k}={v}" for k, v in options.items())
    seeds = max((len(results.seeds.get(k, ())) for k in labels.values()), default=0)
    name = text.strip() + (" (trained)" if reducer in TRAINED else "")
    name += f" ({seeds} seeds)" if seeds else ""
    plain_default = reducer == results.default and not options
    kind = "both" if known(results) else "all"
    cells = []
    for ratio in ratios:
        value = kept(results, labels[ratio], kind) if ratio in labels else None
        interval = plain_default or reducer == RANDOM
        cells.append(NONE if value is None else str(value) if interval else f"{value.value:.1%}")
    return [f"**{name}**" if plain_default else name, *cells]


def overview(results: Results) -> str:
    """The table of one model."""
    ratios = [r for r in RATIOS if r in results.ratios]
    rows = [line(results, m, labels, ratios) for m, labels in methods(results).items()]
    full = results.settings[FULL]["flops"]
    work = [results.settings.get(f"{results.default}-{r:g}", {}).get("flops") for r in ratios]
    rows.append(["FLOPs left", *(f"{w / full:.0%}" if w else NONE for w in work)])
    return table(["method", *(f"ratio {r:g}" for r in ratios)], rows)


def facts(results: Results, tables: str) -> str:
    """What was asked, where every number is, and the runs of the default and the baselines."""
    scores = results.scores(FULL, "both", known(results))
    families = ", ".join(known(results) or ["none"])
    asked = (
        f"{results.manifest['items']} test questions, {len(scores)} of them in the table, on which "
        f"the full model is right in {sum(scores) / len(scores):.1%}. Learned families: "
        f"{families}. [All methods, ratios and families]({tables})."
    )
    shown = {s["run"] for s in results.settings.values() if s["reducer"] == results.default}
    runs = [results.manifest["runs"][number] for number in sorted(shown)]
    mark = "" if all(run.get(MARK, True) for run in runs) else " **Not for publication.**"
    return f"{asked}{mark}\n\n" + "\n".join(f"- {provenance(run)}" for run in runs)


def lost(results: Results, ratio: float, pictures: str) -> str:
    """What the default loses at a ratio, with pictures; "" where nothing was drawn."""
    items = results.settings.get(f"{results.default}-{ratio:g}", {}).get("lost", ())
    folder = f"{pictures}/{results.manifest['model']}/{LOST}"
    rows = [
        [f"{ratio:g}", one["question"], one["full"], one["compressed"],
         f"![what was kept]({folder}/{one['picture']})"]
        for one in items
    ]  # fmt: skip
    head = ["ratio", "question", "full model", "compressed", "what the decoder saw"]
    return table(head, rows) if rows else ""


def page_folder(results: Path) -> Path:
    """Where the page goes: above the published results, else into the folder of the results."""
    return results.parent if results == RESULTS else results


def text(results: Path, every: Sequence[Results]) -> str:
    """The page on every model with test results; the main model first."""
    folder = page_folder(results)
    name = "results" if results == RESULTS else results.name
    title, asked = TITLES.get(name, ("Accuracy under compression", f"Results in `{name}`."))
    methods_page = os.path.relpath(ACCURACY / "METHODS.md", folder)
    links = f"[Methods and columns]({methods_page})."
    parts = [f"# {title}", f"{asked} {COLUMNS.replace(chr(10), ' ')} {links}"]
    pictures, tables = os.path.relpath(results, folder), os.path.relpath(ACCURACY / TABLES, folder)
    ordered = sorted(every, key=lambda one: one.manifest["model"] != MAIN)
    for one in ordered:
        model = one.manifest["model"]
        parts += [f"## {model}", overview(one), facts(one, tables)]
    drawn = [lost(one, r, pictures) for one in ordered for r in RATIOS]
    if any(drawn):
        parts += ["## What the default loses, the first questions by id", *filter(None, drawn)]
    return "\n\n".join(parts) + "\n"


def files(results: Path) -> Files:
    """The page, and the CSV file of every model."""
    every = read_all(results)
    found = {
        results / f"{one.manifest['model']}.csv": csv_text([record(one, k) for k in one.settings])
        for one in every
    }
    if results.name != NO_PAGE:
        found[page_folder(results) / "README.md"] = text(results, every)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(*write(files(parser.parse_args().results.resolve())), sep="\n")


if __name__ == "__main__":
    with one_message():
        main()
