"""The work behind `tokencomp demo`: a table, answers and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokencomp.cli._showcase import answer_prompt, time_prefill
from tokencomp.evaluation.batches import Answerer
from tokencomp.evaluation.comparisons import paired_tests
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun, averaged
from tokencomp.evaluation.settings import FULL, RANDOM, Setting, seeded
from tokencomp.inputs.questions import Example
from tokencomp.pages.demo import AnsweredQuestion, Demo, Row

TIMED_ROWS, SECONDS, SEEDS = 8, 3.0, 3
CHOICE = (
    "Of the questions about each file, the first one is shown that the last method answers and "
    "random dropping does not; if there is none, the first that the last method answers. "
    "The table has all of them."
)
Say = Callable[[str], None]


def make_demo(model: Any, processor: Any, name: str, settings: Sequence[Setting], say: Say) -> Demo:
    """Accuracy, time on videos, and answers about the packaged sample files."""
    examples, asked = packaged_questions(), seeded(settings, SEEDS)
    say(f"{len(examples)} questions, {len(asked)} settings")
    how: dict[str, Any] = {"batch_size": 18, "max_new_tokens": 4, "name": name}
    runs = sweep(model, processor, examples, asked, **how)
    shown = {run.setting: run for run in averaged(list(runs.values())) if run.setting}
    videos = [e for e in examples if str(e.media[0]).endswith(".mp4")][:TIMED_ROWS]
    say("timing the prefill of every setting in turn")
    rows = _rows(model, processor, videos, shown)
    say("answering questions about the sample files")
    ratios = {setting.ratio for setting in settings}
    ratio = 0.75 if 0.75 in ratios else max(ratios)
    some, questions = [s for s in settings if s.name == FULL or s.ratio == ratio], []
    for e in samples(runs, some):
        answers = answer_prompt(model, processor, (e, e.load(8)), some, max_new_tokens=8)
        questions.append(AnsweredQuestion(Path(e.media[0]).name, e.prompt, e.answer, answers))
    full = runs[Setting()]
    counts = len(full.answered), len(full.failed)
    return Demo(name, model_facts(model), rows, questions, *counts, CHOICE)


def packaged_questions() -> list[Example]:
    """The questions about the packaged sample files."""
    from tokencomp.zoo import SAMPLES

    rows = json.loads((SAMPLES / "questions.json").read_text())
    return [
        Example(f"{n} {r['id']}", r["question"], r["answer"], (SAMPLES / r["media"],), r["family"])
        for n, r in enumerate(rows)
    ]


def samples(runs: dict[Setting, EvalRun], shown: Sequence[Setting]) -> list[Example]:
    """One question about each packaged sample file: see `CHOICE`."""
    own = [runs[s].scores for s in shown if s.name not in (FULL, RANDOM)]
    luck = [runs[s].scores for s in shown if s.name == RANDOM]

    def order(example: Example) -> tuple[bool, bool]:
        lost = [scores.get(example.id, 1.0) < 0.5 for scores in luck]
        right = [scores.get(example.id, 0.0) >= 0.5 for scores in own[-1:]]
        return not (all(lost) and all(right)), not all(right)

    by_file: dict[Any, list[Example]] = {}
    for example in packaged_questions():
        by_file.setdefault(example.media, []).append(example)
    return [min(some, key=order) for some in by_file.values()]


def _rows(
    model: Any, processor: Any, timed: Sequence[Example], runs: dict[Setting, EvalRun]
) -> list[Row]:
    """Accuracy on all questions; cost and time of the `timed` ones."""
    batch, rows = [(e, e.load(8)) for e in timed], []
    splits = time_prefill(model, processor, batch, list(runs), SECONDS)
    answerer = Answerer({"": model}, processor, {})
    with answerer.patches:
        costs_of = {setting: answerer.prefill(setting, batch)[1] for setting in runs}
    for setting, run in runs.items():
        costs = costs_of[setting]
        layers = zip(*(cost.per_layer for cost in costs), strict=True)
        per_layer = [round(sum(seen) / len(seen)) for seen in layers]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for record in run.answered:
            kinds.setdefault(record["kind"], []).append(record)
        row = Row(
            setting,
            seeds=len(run.seeds),
            per_layer=per_layer,
            ratio=statistics.fmean(cost.ratio for cost in costs),
            flops=statistics.fmean(cost.flops for cost in costs),
            kv_bytes=statistics.fmean(cost.kv_bytes for cost in costs),
            split=splits[setting],
            prefill_ratio=splits[setting].llm / splits[Setting()].llm,
            accuracy=run.mean("correct"),
            by_modality={
                kind: EvalRun(setting, own).mean("correct") for kind, own in kinds.items()
            },
            deviation=setting.deviation(len(per_layer)),
            **({} if setting.off else paired_tests(run, list(runs.values()))),
        )
        rows.append(row)
    return rows


def model_facts(model: Any) -> dict[str, Any]:
    from tokencomp.adapters.registry import adapter_for

    adapter = adapter_for(model)
    return {
        **environment(),
        "family": adapter.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(adapter.layers),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
