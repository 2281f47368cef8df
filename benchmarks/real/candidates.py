"""Candidates for the default reducer on the validation questions about photographs.

    python -m benchmarks.real.candidates            # → merging.json, merging.md
    python -m benchmarks.real.candidates --report   # the page from its results alone

Needs the model of `python -m recipes.photographs.build`. `benchmarks.accuracy.studies.choose` reads
the results, and those of a former model in candidates.json, which is not asked any more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.run import tower_once
from benchmarks.accuracy.store import Results
from benchmarks.experiment import Experiment
from benchmarks.gpu.contribution import Row
from benchmarks.gpu.recompute import runs_of
from benchmarks.real.run import HERE, packed
from benchmarks.real.run import RESULTS as TEST_RESULTS
from recipes.photographs.build import FOLDER
from recipes.photographs.items import LETTERS, StampItem, items
from recipes.photographs.sources import TUXPAINT, Photos
from tokencomp.evaluation.metrics import difference
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun, paired_scores
from tokencomp.evaluation.settings import FULL, MERGE, RANDOM, Setting, label_of

FORMER, RESULTS = HERE / "candidates.json", HERE / "merging.json"
MODEL = "real-fastvlm"
CANDIDATES: list[tuple[str, dict[str, Any]]] = [
    ("kcenter", {}),
    ("kcenter", {MERGE: True}),
    ("scope", {"saliency": "none"}),
    ("scope", {"saliency": "none", MERGE: True}),
]
"""Needs neither training nor attention of the decoder; `kcenter` is the default on images."""
RATIOS = (0.5, 0.75, 0.9, 0.95)
HEAD = """# Does merging keep more of photographs than dropping?

`python -m benchmarks.real.candidates`. Validation questions about [photographs](README.md), on the
families that the model has learned. Cells: right answers, and the difference to `random` in points
with its paired 95 % interval. The [choice of the default](../accuracy/choice.md) counts these
answers together with those of the embedded models.
"""


def learned() -> list[str]:
    """Families that the published results call learned, by validation questions, in words."""
    names: list[str] = publishing.read(TEST_RESULTS)["learned"]
    return [name for name in names if name != LETTERS]


@dataclass(frozen=True)
class OneKind(Results):
    """Results whose questions are all about one modality, which counts as "images"."""

    def select(self, kind: str, families: Iterable[str] | None = None) -> list[int]:
        allowed = None if families is None else {*families}
        names = enumerate(self.answers.questions.families)
        return [i for i, name in names if kind != "videos" and (allowed is None or name in allowed)]


def photographs(path: Path = FORMER) -> OneKind:
    """The stored answers, in the form of those of the embedded models."""
    stored = publishing.read(path)
    return as_results(stored, MODEL if path == FORMER else f"{MODEL}-448", stored["environment"])


def as_results(stored: dict[str, Any], model: str, about: dict[str, Any]) -> OneKind:
    """Rows and answers of learned families, as `benchmarks.accuracy` ranks them."""
    answers = PackedAnswers.from_json(stored["answers"])
    rows = {FULL: {"reducer": FULL, "run": 0}}
    correct = {FULL: answers.correct[FULL]}
    for row in stored["rows"]:
        if row["reducer"] != FULL:
            label = label_of(row["reducer"], f"{row['ratio']:g}", row["options"])
            rows[label] = {"reducer": row["reducer"], "ratio": row["ratio"], "run": 0}
            correct[label] = answers.correct[row["label"]]
    count, families = len(answers.questions), tuple(dict.fromkeys(answers.questions.families))
    known = {"model": model, "split": "validation", "items": count, "runs": [about]}
    return OneKind({**known, "settings": rows}, PackedAnswers(answers.questions, correct), families)


def answer(
    model: Any, processor: Any, questions: Iterable[StampItem], batch: int, folder: Path
) -> dict[str, Any]:
    """Content of the result file, without provenance: rows of cost, and a bit per question.

    A run that was stopped goes on from the answers in `folder`.
    """
    methods = [(RANDOM, {}), *CANDIDATES]
    grid = [Setting(), *(Setting(n, r, o) for n, o in methods for r in RATIOS)]
    how = {"batch_size": batch, "max_new_tokens": 4, "name": MODEL}
    examples = [one.example() for one in questions]
    with tower_once(model):
        return packed(sweep(model, processor, examples, grid, folder, **how))


def page(results: dict[str, Any]) -> str:
    """Markdown of a result file."""
    rows = [Row.model_validate(row) for row in results["rows"]]
    runs = runs_of(rows, PackedAnswers.from_json(results["answers"]))
    full, by_ratio = runs[0], {r.ratio: r for r in runs if r.identity["reducer"] == RANDOM}
    names = [*dict.fromkeys(_name(run) for run in runs[1:])]
    lines = [[name, *(_cell(runs, by_ratio, name, ratio) for ratio in RATIOS)] for name in names]
    head = ["method", *(f"ratio {ratio:g}" for ratio in RATIOS)]
    families = sorted({record["family"] for record in full.records})
    about = (
        f"{len(full.records)} questions about {', '.join(families)}; the full model answers "
        f"{full.mean('correct'):.1%}."
    )
    return "\n".join([HEAD, publishing.table(head, lines), "", about, ""])


def _name(run: EvalRun) -> str:
    options = ", ".join(f"{key}={value}" for key, value in run.identity["options"].items())
    return f"{run.identity['reducer']} {options}".strip()


def _cell(runs: list[EvalRun], randoms: dict[float, EvalRun], name: str, ratio: float) -> str:
    """Accuracy of a candidate, and its difference to random."""
    (run,) = (r for r in runs if _name(r) == name and r.ratio == ratio)
    value = f"{run.mean('correct'):.1%}"
    if run is randoms[ratio]:
        return value
    return f"{value}, {difference(*paired_scores(run, randoms[ratio]))}"


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All candidates, on the validation questions."""
    from recipes.photographs.model import load

    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    asked = items(Photos(args.photos), "validation", args.per_family, tuple(learned()))
    yield answer(model, processor, asked, args.batch, FOLDER / "runs" / "candidates")


OPTIONS = {
    "model": FOLDER / "model",
    "photos": TUXPAINT,
    "per_family": 60,
    "batch": 25,
    "threads": torch.get_num_threads(),
}
EXPERIMENT = Experiment("real/merging", measure, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
