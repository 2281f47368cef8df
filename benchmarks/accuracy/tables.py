"""Tables of the accuracy benchmark, as Markdown."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.store import KINDS, LOST, Results, kind_of
from benchmarks.accuracy.work import PARTS, work_cell
from tokencomp.errors import TokenCompError
from tokencomp.evaluation.metrics import McNemar, Retention, difference, mcnemar, retention
from tokencomp.evaluation.settings import DOWNSCALE, FULL, Setting
from tokencomp.zoo import available_models, metrics, model_path

BASELINES = ("random", "uniform", DOWNSCALE)
SLACK = 0.05  # of the ratio, for a baseline that cannot reach it exactly
NONE = "–"
READING = "reading"


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


def cell(value: Retention | None, interval: bool = True) -> str:
    if value is None:
        return NONE
    return str(value) if interval else f"{value.value:.1%}"


EARLIER = ("Tango()", "HiPrune()")
"""Stored methods whose reducer follows another rule today, see METHODS.md."""


def name(setting: dict[str, Any], default: str) -> str:
    """Reducer and options; bold for the default."""
    options = ", ".join(f"{k}={v}" for k, v in setting["options"].items())
    options += "(earlier rule)" if setting.get("method") in EARLIER else ""
    bold = setting["reducer"] == default and not options
    return f"**{setting['reducer']}**" if bold else f"{setting['reducer']} {options}".strip()


def at(results: Results, ratio: float) -> list[str]:
    """Labels at one ratio: baselines first, then by the number of correct answers."""
    settings = results.settings
    labels = [k for k, s in settings.items() if s["ratio"] == ratio]
    baselines = [k for b in BASELINES for k in labels if settings[k]["reducer"] == b]
    methods = [k for k in labels if k not in baselines]
    return baselines + sorted(methods, key=lambda k: (-sum(results.scores(k)), k))


def ratio_table(results: Results, ratio: float, default: str) -> str:
    """Retention with paired 95 % intervals, p against random and the default, and cost."""
    tests = ["p vs random", f"p vs {default}"]
    head = ["method", *KINDS, "both", "all families", *tests, "achieved ratio", "FLOPs left"]
    rows, notes = [], []
    for label in at(results, ratio):
        setting = results.settings[label]
        flops = setting["flops"] / results.settings[FULL]["flops"]
        cells = [cell(kept(results, label, kind)) for kind in (*KINDS, "both", "all")]
        cells[2] += spread(results, label)
        by_modality = [f"{results.reached(label, k):.3f}" for k in KINDS]
        at_ratio = reaches(results, label, "both")
        achieved = f"{setting['achieved_ratio']:.3f}" if at_ratio else " / ".join(by_modality)
        p = [against(results, label, f"{base}-{ratio:g}") for base in ("random", default)]
        note = deviation(results, setting)
        notes += [f"{name(setting, default)} {note}"] if note else []
        method = name_of(results, label, default)
        rows.append([method, *cells, *p, achieved, f"{flops:.0%}"])
    return table(head, rows) + (f"\n\n† {'; '.join(notes)}." if notes else "")


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


def rivals_table(results: Results, ratio: float, default: str) -> str:
    """Accuracy on the learned families, and differences to full model and baselines.

    Empty where the model has learned none of the families.
    """
    if not results.learned:
        return ""
    random = f"random-{ratio:g}"
    small = f"{DOWNSCALE}-{ratio:g}"
    small_ones = [small] if small in results.settings and reaches(results, small, "both") else []
    drawn = [random] if random in results.settings else []
    columns = {"vs full": [FULL], "vs random": drawn, "vs downscale": small_ones}
    head = ["method", "accuracy", *columns, "where downscale fails", "same answer as full"]
    reading = [READING] if READING in results.families else []
    rows = []
    for label in at(results, ratio):
        cells = [accuracy_cell(results.scores(label, "both", results.learned))]
        cells += [versus(results, label, bases) for bases in columns.values()]
        cells += [detail(results, label, ratio), agreement(results, label)]
        cells += [f"{results.accuracy(label, name):.0%}" for name in reading]
        rows.append([name_of(results, label, default), *cells])
    return table([*head, *reading], rows)


def name_of(results: Results, label: str, default: str) -> str:
    """The method of a label, marked where it departs from its paper."""
    setting = results.settings[label]
    many = f" ({len(results.seeds[label])} seeds)" if label in results.seeds else ""
    return name(setting, default) + many + ("†" if deviation(results, setting) else "")


def spread(results: Results, label: str, kind: str = "both") -> str:
    """What the worst and the best seed of `random` keep; "" of other methods."""
    families = None if kind == "all" else results.learned
    places, full = results.select(kind, families), sum(results.scores(FULL, kind, families))
    seeds = results.seeds.get(label, ()) if full else ()  # nothing is kept of no right answer
    kept = [sum(scores[i] for i in places) / full for scores in seeds]
    return f", seeds {min(kept):.1%} to {max(kept):.1%}" if kept else ""


def accuracy_cell(scores: Sequence[float]) -> str:
    return f"{sum(scores) / len(scores):.1%}" if scores else NONE


def versus(results: Results, label: str, bases: Sequence[str]) -> str:
    """Difference to the mean of some baselines in points on the learned families."""
    scores = results.scores(label, "both", results.learned)
    if not bases or label in bases or not scores or not reaches(results, label, "both"):
        return NONE
    every = [results.scores(base, "both", results.learned) for base in bases]
    return str(difference(scores, [sum(one) / len(bases) for one in zip(*every, strict=True)]))


def detail(results: Results, label: str, ratio: float) -> str:
    """Accuracy on the questions of the learned families that downscaling gets wrong."""
    base = f"{DOWNSCALE}-{ratio:g}"
    if base not in results.settings or not reaches(results, base, "both"):
        return NONE
    ours, blurred = (results.scores(k, "both", results.learned) for k in (label, base))
    scores = [right for right, other in zip(ours, blurred, strict=True) if not other]
    return f"{sum(scores) / len(scores):.0%} of {len(scores)}" if scores else NONE


def agreement(results: Results, label: str) -> str:
    """Share of the learned families' questions that get the very answer of the full model."""
    agrees = results.answers.agrees[label]
    return accuracy_cell([agrees[i] for i in results.select("both", results.learned)])


def work_table(results: Results, ratio: float, default: str) -> str:
    """Where the work of an answer goes, images / videos; "" for results without counts.

    The full model's row has amounts, the other rows have shares of them; the reducer's own work is
    a share of the full model's prefill.
    """
    full = results.settings[FULL].get("work")
    labels = [label for label in at(results, ratio) if "work" in results.settings[label]]
    if not full or not labels:
        return ""
    titles = {"decode": "decode, per token", "kv_bytes": "KV bytes"}
    head = ["method", *(titles.get(part, part) for part in PARTS)]
    rows = [["full", *_work_cells(full, None)]]
    for label in labels:
        setting = results.settings[label]
        rows.append([name_of(results, label, default), *_work_cells(setting["work"], full)])
    return table(head, rows)


def _work_cells(work: dict[str, Any], full: dict[str, Any] | None) -> list[str]:
    """One cell per part, the modalities in order; one value where all are equal."""
    cells = []
    for part in PARTS:
        values = [work_cell(work[k], part, full and full.get(k)) for k in KINDS if k in work]
        cells.append(" / ".join(values) if len(set(values)) > 1 else values[0])
    return cells


def lost_table(results: Results, ratio: float, default: str, pictures: str) -> str:
    """What the default loses at a ratio, with pictures; "" where nothing was drawn."""
    lost = results.settings.get(f"{default}-{ratio:g}", {}).get("lost", ())
    rows = [
        [
            f"`{item['id']}`",
            item["question"],
            item["full"],
            item["compressed"],
            f"![what was kept]({pictures}/{results.manifest['model']}/{LOST}/{item['picture']})",
        ]
        for item in lost
    ]
    head = ["question", "", "full model", "compressed", "what the decoder saw"]
    return table(head, rows) if rows else ""


def against(results: Results, label: str, base: str) -> str:
    """p of `label` against `base`, + where better, − where worse."""
    missing = base not in results.settings or not results.scores(label, "both", results.learned)
    if label == base or missing or not reaches(results, label, "both"):
        return ""
    test = compared(results, label, base, "both")
    sign = "" if test.p >= 0.05 else " +" if test.wins > test.losses else " −"
    return f"{test.p:.2g}{sign}"


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


def loss_table(losses: Sequence[Comparison]) -> str:
    head = ["family", "learned", "ratio", "baseline", "full", "default", "baseline's"]
    rows = [
        [
            one.family,
            "yes" if one.learned else "no",
            f"{one.ratio:g}",
            one.base,
            *(f"{a:.0%}" for a in (one.full, one.default, one.baseline)),
            str(one.test.wins),
            str(one.test.losses),
            f"{one.test.p:.2g}",
        ]
        for one in sorted(losses, key=lambda x: (x.family, x.ratio))
    ]
    return table([*head, "won", "lost", "p"], rows)


def family_table(results: Results, labels: Sequence[str]) -> str:
    """Accuracy per question family."""

    def accuracy(label: str, family: str) -> str:
        comparable = reaches(results, label, kind_of(family))
        return f"{results.accuracy(label, family):.0%}" if comparable else NONE

    rows = [[f, *(accuracy(label, f) for label in labels)] for f in results.families]
    return table(["family", *labels], rows)
