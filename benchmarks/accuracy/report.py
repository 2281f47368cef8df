"""The pages of the accuracy benchmark, from its result files alone.

A page has the default, its variants, the baselines and the best other methods at three ratios. The
tables of a model have every method, ratio and question family.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.store import (
    ACCURACY,
    KINDS,
    LOST,
    MAIN,
    RESULTS,
    Results,
    kind_of,
    read_all,
)
from benchmarks.experiment import Files
from benchmarks.publishing import MARK, TABLES, csv_text, provenance
from tokencomp.errors import TokenCompError
from tokencomp.evaluation.metrics import McNemar, Retention, difference, mcnemar, retention
from tokencomp.evaluation.settings import DOWNSCALE, FULL, RANDOM, Setting
from tokencomp.zoo import available_models, metrics, model_path

BASELINES = (RANDOM, "uniform", DOWNSCALE)
SLACK = 0.05  # of the ratio, for a baseline that cannot reach it exactly
NONE = "–"
EARLIER = ("Tango()", "HiPrune()")
"""Stored methods whose reducer follows another rule today, see METHODS.md."""

table = functools.partial(publishing.table, rule=" --- ")


def kept(results: Results, label: str, kind: str) -> Retention | None:
    """Retention over the learned families of "images", "videos" or "both", or over "all" questions.

    None without such questions, or for a baseline that does not get down to the ratio there.
    """
    families = None if kind == "all" else results.learned
    scores = results.scores(label, kind, families)
    if not scores or not reaches(results, label, kind):
        return None
    return retention(scores, results.scores(FULL, kind, families))


def reaches(results: Results, label: str, kind: str) -> bool:
    """Whether a baseline drops as many tokens as its ratio says, within `SLACK`."""
    setting = results.settings[label]
    is_baseline = setting["reducer"] in BASELINES
    return not is_baseline or results.reached(label, kind) >= setting["ratio"] - SLACK


def earlier(setting: dict[str, Any]) -> str:
    """A mark of answers by a reducer that has another rule today."""
    return " (earlier rule)" if setting.get("method") in EARLIER else ""


def record(results: Results, label: str) -> dict[str, Any]:
    """One row of the CSV file of a model. Shares are of the full model's amounts.

    `kept_*` is retention with its paired 95 % interval, `vs_*` a difference of accuracy on the
    learned families, `p_*` an exact McNemar test on them; METHODS.md explains the columns.
    """
    setting, full = results.settings[label], results.settings[FULL]
    run = results.manifest["runs"][setting["run"]]
    row: dict[str, Any] = {
        "reducer": setting["reducer"] + earlier(setting),
        "options": setting["options"],
        "ratio": setting["ratio"],
        "seeds": len(results.seeds.get(label, (1,))),
        "commit": str(run["commit"])[:12] + ("+dirty" if "+" in str(run["commit"]) else ""),
        "date": run["date"][:10],
        "achieved_ratio": setting["achieved_ratio"],
        "flops": setting["flops"] / full["flops"],
        "departs_from_paper": deviation(results, setting),
    }
    for kind in (*KINDS, "both", "all"):
        share = kept(results, label, kind) if label != FULL else None
        row |= publishing.interval_columns(f"kept_{kind}", share)
    row |= _against(results, label)
    row |= {f"family_{f}": _accuracy(results, label, f) for f in results.families}
    return row | _work(setting.get("work", {}), full.get("work", {}))


def _accuracy(results: Results, label: str, family: str) -> float | None:
    comparable = reaches(results, label, kind_of(family))
    return results.accuracy(label, family) if comparable else None


def _against(results: Results, label: str) -> dict[str, Any]:
    """Accuracy on the learned families, and how it compares with other settings there."""
    scores, ratio = results.scores(label, "both", results.learned), results.settings[label]["ratio"]
    row: dict[str, Any] = {"accuracy": sum(scores) / len(scores) if scores else None}
    default = results.default
    others = {"full": FULL, RANDOM: f"{RANDOM}-{ratio:g}", DOWNSCALE: f"{DOWNSCALE}-{ratio:g}"}
    others["default"] = f"{default}-{ratio:g}"
    usable = {
        name: other
        for name, other in others.items()
        if scores and other != label and other in results.settings
        if all(reaches(results, one, "both") for one in (label, other))
    }
    for name in others:
        gap = None
        if name in usable:
            gap = difference(scores, results.scores(usable[name], "both", results.learned))
        row |= publishing.interval_columns(f"vs_{name}", gap)
    for name in (RANDOM, "default"):
        test = compared(results, label, usable[name], "both") if name in usable else None
        row[f"p_{name}"] = test and test.p
    if DOWNSCALE in usable:
        blurred = results.scores(usable[DOWNSCALE], "both", results.learned)
        detail = [right for right, other in zip(scores, blurred, strict=True) if not other]
        row["where_downscale_fails"] = sum(detail) / len(detail) if detail else None
    agrees = results.answers.agrees[label]
    same = [agrees[i] for i in results.select("both", results.learned)]
    return row | {"same_answer": sum(same) / len(same) if same else None}


def _work(work: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """FLOPs and bytes of one answer by part, as shares; of the reducer as a share of the prefill.

    The full model's row has the amounts.
    """
    row = {}
    for kind, parts in work.items():
        for part, value in parts.items():
            base = full[kind]["prefill" if part == "reduce" else part]
            known = value if work is full else value / base if value is not None and base else None
            row[f"{part}_{kind}"] = known
    return row


def deviation(results: Results, setting: dict[str, Any]) -> str:
    """How the method departs from its paper on this model; "" where it does not.

    Of a method with options that only an earlier release had, that it has.
    """
    model = results.manifest["model"]
    if model not in available_models():
        return ""
    layers = metrics(model)["model"]["layers"]
    decoded = max((run.get("frames", 0) for run in results.manifest["runs"]), default=0)
    known = steps(model, decoded) if "videos" in results.kinds else 0
    try:
        return Setting(setting["reducer"], setting["ratio"], setting["options"]).deviation(
            layers, known
        )
    except TokenCompError:
        return "has options of release 0.1"


@functools.cache
def steps(model: str, frames: int) -> int:
    """Steps in time of a video in an embedded model; towers of Qwen read frames in pairs."""
    vision = json.loads((model_path(model) / "config.json").read_text()).get("vision_config", {})
    return -(-frames // vision.get("temporal_patch_size", 1))


def compared(results: Results, label: str, base: str, kind: str) -> McNemar:
    """McNemar over the learned families of one kind."""
    pair = [results.scores(one, kind, results.learned) for one in (label, base)]
    return mcnemar(*pair)


@dataclass(frozen=True)
class Comparison:
    """The default and a baseline at the same ratio, on one family.

    Attributes
    ----------
    family, learned
        The question family, and whether the model has learned it.
    ratio, base
        The ratio, and the name of the baseline.
    default, baseline, full
        Accuracy of the default, of the baseline, and of the uncompressed model.
    test
        Paired test; a win is a question that only the default answers correctly.
    """

    family: str
    learned: bool
    ratio: float
    base: str
    default: float
    baseline: float
    full: float
    test: McNemar

    @property
    def lost(self) -> bool:
        return self.default < self.baseline


def rivals(results: Results, default: str) -> Iterator[tuple[float, str, str, str]]:
    """Ratio, baseline's name, label of the default, label of the baseline, where both ran."""
    for ratio, base in itertools.product(results.ratios, BASELINES):
        labels = f"{default}-{ratio:g}", f"{base}-{ratio:g}"
        if {*labels} <= results.settings.keys():
            yield ratio, base, *labels


def compare_families(results: Results, default: str) -> list[Comparison]:
    """One comparison per family, ratio and baseline."""
    comparisons = []
    for (ratio, base, *labels), family in itertools.product(
        rivals(results, default), results.families
    ):
        if reaches(results, labels[1], kind_of(family)):
            test = mcnemar(*(results.scores(k, families=[family]) for k in labels))
            accuracies = (results.accuracy(k, family) for k in (*labels, FULL))
            learned = family in results.learned
            comparisons.append(Comparison(family, learned, ratio, base, *accuracies, test))
    return comparisons


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


def lines(
    results: Results, method: Method, labels: dict[float, str], ratios: Any
) -> Iterator[list[str]]:
    """One method: its name, and its retention at every ratio; the default by media as well."""
    reducer, options = method[0], json.loads(method[1])
    setting = results.settings[next(iter(labels.values()))]
    text = f"{reducer}{earlier(setting)} " + ", ".join(f"{k}={v}" for k, v in options.items())
    seeds = max((len(results.seeds.get(k, ())) for k in labels.values()), default=0)
    name = text.strip() + (" (trained)" if reducer in TRAINED else "")
    name += f" ({seeds} seeds)" if seeds else ""
    plain_default = reducer == results.default and not options
    kind = "both" if known(results) else "all"
    interval = plain_default or reducer == RANDOM

    def cells(kind: str) -> Iterator[str]:
        for ratio in ratios:
            value = kept(results, labels[ratio], kind) if ratio in labels else None
            yield NONE if value is None else str(value) if interval else f"{value.value:.1%}"

    yield [f"**{name}**" if plain_default else name, *cells(kind)]
    media = [k for k in KINDS if kind == "both" and results.select(k, results.learned)]
    if plain_default and len(media) > 1:
        yield from ([f"{name}, {one} alone", *cells(one)] for one in media)


def overview(results: Results) -> str:
    """The table of one model."""
    ratios = [r for r in RATIOS if r in results.ratios]
    rows = [
        row for m, labels in methods(results).items() for row in lines(results, m, labels, ratios)
    ]
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
    labels = {label for by_ratio in methods(results).values() for label in by_ratio.values()}
    shown = {results.settings[label]["run"] for label in labels}
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
